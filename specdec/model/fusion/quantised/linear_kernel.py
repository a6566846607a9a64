"""Triton kernels for `specdec.model.fusion.quantised.linear`, built as those of `skinny_linear_kernel` are.

* Up to SLICED_ROWS rows: tensor cores, each warp with a slice of the inner dimension; the slices are added at the end.
* More rows: larger tiles, in parts along the inner dimension, which `add_parts` adds up.

A unit is the run of bytes of one output that shares a scale, or of which each half byte does. Integers and e4m3 numbers
are exact in 16 bits, so a unit is multiplied as it is; scales, and zeros that are no integers, join in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.gpu import multiprocessors
from attention.pdl_kernel import await_input, overlapping
from specdec.model.fusion.quantised.numbers_kernel import converts_fast, eight_bits, four_bits
from specdec.model.fusion.quantised.packed import HALF
from specdec.model.fusion.skinny_linear_kernel import (
    add_parts,
    cut,
    load,
    plus,
    prefetch,
    room_for,
    stages,
)

UNIT = 128  # bytes, where scales allow it
SLICED_ROWS, BLOCK_N, SLICES = 16, 32, 4  # more rows use tiles; outputs and slices: the fastest of 12 on an H200
TILE_N, MOST_PARTS, PROGRAMS = 64, 4, 3  # outputs of a tile, parts of the inner dimension, tiles a multiprocessor
LAYOUTS = {
    "int8": dict(INT4=False, FP8=False, BFLOAT=False, SHIFTED=False),
    "fp8": dict(INT4=False, FP8=True, BFLOAT=False, SHIFTED=False),
    "int4 float16": dict(INT4=True, FP8=False, BFLOAT=False, SHIFTED=False),
    "int4 bfloat16": dict(INT4=True, FP8=False, BFLOAT=True, SHIFTED=False),
    "int4 float16 shifted": dict(INT4=True, FP8=False, BFLOAT=False, SHIFTED=True),
    "int4 bfloat16 shifted": dict(INT4=True, FP8=False, BFLOAT=True, SHIFTED=True),
}


@triton.jit
def _scale(word, BFLOAT: tl.constexpr):
    """The low 16 bits of words as a number."""
    if BFLOAT:
        number = (word << 16).to(tl.float32, bitcast=True)
    else:
        number = (word & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _zero(word, SHIFTED: tl.constexpr):
    """What is taken from 4-bit numbers before they are multiplied."""
    if SHIFTED:
        zero = tl.full(word.shape, 8, tl.int32)
    else:
        zero = word >> 16
    return zero


@triton.jit
def _times(total, numbers, x, word, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr):
    """`total` plus `x [.., K, M]` times 4-bit `numbers [.., N, K]`, which have a scale and zero for each output."""
    product = tl.dot(numbers, x) * _scale(word, BFLOAT)
    if SHIFTED:
        sums = tl.sum(x.to(tl.float32), len(x.shape) - 2)
        product += _scale(word >> 16, BFLOAT) * tl.expand_dims(sums, len(x.shape) - 2)
    return total + product


@triton.jit
def _rows(first, position, inner, EVEN: tl.constexpr):
    """Elements of rows that begin at `first`; zeros past the inner dimension."""
    if EVEN:
        values = tl.load(first + position)
    else:
        values = tl.load(first + position, mask=position < inner, other=0.0)
    return values


@triton.jit(do_not_specialize=["rows"])  # one row would be read in smaller pieces
def _sliced_kernel(x, values, scales, bias, added, out, rows, outputs, inner, width, values_row, groups, tall,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, UNIT: tl.constexpr,
                   STAGES: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
                   FP8: tl.constexpr, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr, FAST: tl.constexpr,
                   BIAS: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    piece, u, row = tl.arange(0, SLICES), tl.arange(0, UNIT), tl.minimum(n, outputs - 1)
    k = piece[:, None] * UNIT + u[None, :]
    first = values + row.to(tl.int64) * values_row
    tiles = first[None, :, None] + k[:, None, :]
    inputs = x + tl.minimum(m, rows - 1)[None, None, :] * inner
    scale_row = scales + (row // tall).to(tl.int64) * groups
    prefetch(first, width, SLICES * UNIT, OVERLAP, 128)
    await_input(OVERLAP)
    total = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, width, SLICES * UNIT, num_stages=STAGES):
        tile = load(tiles + start, start + k[:, None, :], width, EVEN)
        if INT4:
            at = 2 * (start + piece * UNIT)
            place = at[:, None, None] + u[None, :, None]
            low = tl.load(scale_row[None, :] + tl.minimum(at // GROUP, groups - 1)[:, None])[:, :, None]
            high = low
            if GROUP % (2 * UNIT):
                high = tl.load(scale_row[None, :] + tl.minimum((at + UNIT) // GROUP, groups - 1)[:, None])[:, :, None]
            lower, upper = four_bits(tile, _zero(low, SHIFTED), _zero(high, SHIFTED), x, FAST)
            total = _times(total, lower, _rows(inputs, place, inner, EVEN), low, BFLOAT, SHIFTED)
            total = _times(total, upper, _rows(inputs, place + UNIT, inner, EVEN), high, BFLOAT, SHIFTED)
        else:
            place = start + k[:, :, None]
            given = _rows(inputs, place, inner, EVEN)
            product = tl.dot(eight_bits(tile, x, FP8, FAST), given)
            if GROUP:
                at = tl.minimum((start + piece * UNIT) // GROUP, groups - 1)
                product *= tl.load(scale_row[None, :] + at[:, None])[:, :, None]
            total += product
    result = tl.sum(total, 0)
    if not GROUP:
        result *= tl.load(scale_row)[:, None]
    place, inside = m[None, :] * outputs + n[:, None], (m < rows)[None, :] & (n < outputs)[:, None]
    result = plus(result, bias, n[:, None], (n < outputs)[:, None], BIAS)
    result = plus(result, added, place, inside, ADDED)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile_kernel(x, values, scales, bias, added, out, rows, outputs, inner, width, values_row, groups, tall,
                 part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
                 EVEN: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr, FP8: tl.constexpr,
                 BFLOAT: tl.constexpr, SHIFTED: tl.constexpr, FAST: tl.constexpr, BIAS: tl.constexpr,
                 ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Program (n, s): tile n of the outputs over `part` bytes of each from s part on, `out [parts, rows, outputs]`."""
    m, n, u = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, UNIT)
    row, begin = tl.minimum(n, outputs - 1), tl.program_id(1) * part
    first = values + row.to(tl.int64) * values_row
    inputs = x + tl.minimum(m, rows - 1)[None, :] * inner
    scale_row = scales + (row // tall).to(tl.int64) * groups
    end = tl.minimum(begin + part, width)
    prefetch(first + begin, end - begin, 2 * UNIT, OVERLAP, 128)
    await_input(OVERLAP)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, end, UNIT, num_stages=STAGES):
        tile = load(first[:, None] + start + u[None, :], start + u[None, :], width, EVEN)
        if INT4:
            place = 2 * start + u[:, None]
            low = tl.load(scale_row + 2 * start // GROUP)[:, None]
            high = low
            if GROUP % (2 * UNIT):
                high = tl.load(scale_row + (2 * start + UNIT) // GROUP)[:, None]
            lower, upper = four_bits(tile, _zero(low, SHIFTED), _zero(high, SHIFTED), x, FAST)
            total = _times(total, lower, _rows(inputs, place, inner, EVEN), low, BFLOAT, SHIFTED)
            total = _times(total, upper, _rows(inputs, place + UNIT, inner, EVEN), high, BFLOAT, SHIFTED)
        else:
            place = start + u[:, None]
            given = _rows(inputs, place, inner, EVEN)
            product = tl.dot(eight_bits(tile, x, FP8, FAST), given)
            if GROUP:
                product *= tl.load(scale_row + start // GROUP)[:, None]
            total += product
    if not GROUP:
        total *= tl.load(scale_row)[:, None]
    total = plus(total, bias, n[:, None], (n < outputs)[:, None], BIAS)
    place = (tl.program_id(1) * rows + m[None, :]) * outputs + n[:, None]
    inside = (m < rows)[None, :] & (n < outputs)[:, None]
    total = plus(total, added, place, inside, ADDED)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def launch_quantised_linear(x: Tensor, values: Tensor, scales: Tensor, layout: str, group: int, tall: int,
                            bias: Tensor | None, added: Tensor | None,
                            norm: tuple[Tensor, float, bool] | None = None
                            ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`quantised_linear` by the kernel for as many rows; `values`, `scales`, `group` and `tall` as in a packed weight.

    layout: a key of LAYOUTS.

    The second result is the product's norm (`product_inputs.Norm`) where that takes no further launch, else None."""
    (outputs, width), kind = values.shape, LAYOUTS[layout]
    inner = x.shape[-1]
    rows, out = x.reshape(-1, inner).contiguous(), x.new_empty(*x.shape[:-1], outputs)
    if not outputs:
        return out, None
    added = None if added is None else added.contiguous()
    values = values.view(torch.uint8 if kind["INT4"] else torch.int8)
    unit = min(group, HALF) if kind["INT4"] else UNIT if group >= inner or group % UNIT == 0 else HALF
    tensors, options = (rows, values, scales, bias, added), dict(BIAS=bias is not None, ADDED=added is not None)
    options |= overlapping(x.device)
    sizes = outputs, inner, width, values.stride(0), scales.shape[1], tall
    same = dict(UNIT=unit, GROUP=group if kind["INT4"] or group < inner else 0, FAST=converts_fast(x.device), **kind)
    block_m = max(8, triton.next_power_of_2(len(rows)))
    if block_m <= SLICED_ROWS:
        deep = stages(x.device, SLICES * unit * (BLOCK_N // 2 + block_m * (1 + kind["INT4"])), 4 if block_m == 8 else 3)
        _sliced_kernel[(triton.cdiv(outputs, BLOCK_N),)](
            *tensors, out, len(rows), *sizes, BLOCK_M=block_m, BLOCK_N=BLOCK_N, SLICES=SLICES, STAGES=deep,
            EVEN=width % (SLICES * unit) == 0, num_warps=SLICES, **same, **options)  # fmt: skip
        return out, None
    tiles = triton.cdiv(outputs, TILE_N)
    most = max(1, min(MOST_PARTS, PROGRAMS * multiprocessors(x.device) // tiles))
    part, count = cut(width, unit, most)
    parts, of_parts = room_for(count, out, options)
    deep = stages(x.device, unit * (TILE_N // 2 + block_m * (1 + kind["INT4"])), 5 if kind["INT4"] else 3)
    _tile_kernel[(tiles, count)](
        *tensors, parts, len(rows), *sizes, part, BLOCK_M=block_m, BLOCK_N=TILE_N, STAGES=deep,
        EVEN=width % unit == 0, num_warps=4, **same, **of_parts)  # fmt: skip
    return out, add_parts(parts, count, bias, added, out, options, norm)
