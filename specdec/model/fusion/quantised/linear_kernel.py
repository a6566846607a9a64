"""Triton kernels for `specdec.model.fusion.quantised.linear`, built as those of `skinny_linear_kernel` are.

* Few rows, SLICED_ROWS: tensor cores, each warp with a slice of the inner dimension; the slices are added at the end.
* More rows: larger tiles, in parts along the inner dimension, which `add_parts` adds up.

A unit is a run of stored numbers of one output that share a scale; in 4 bits, of words of four numbers, of which the
first ones, the second ones and so on each do. Integers and e4m3 numbers are exact in 16 bits, so a unit is multiplied
as it is; scales, and zeros that are no integers, join in float32."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.gpu import multiprocessors
from attention.pdl_kernel import await_input, overlapping
from specdec.model.fusion.quantised.numbers_kernel import converts_fast, eight_bits, four_bits
from specdec.model.fusion.quantised.packed import LEAST_UNIT, span_of
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
BLOCK_N, SLICES, SLICED_ROWS = 32, 4, {False: 16, True: 8}  # outputs, slices; rows, also of four bits: the fastest of
TILE_N, WIDE_TILE_N = 64, 128  # some 40 on an H200. Outputs of a tile, and of one of up to 16 rows
MOST_PARTS, PROGRAMS = 4, 3  # parts of the inner dimension, tiles a multiprocessor
LAYOUTS = {
    "int8": dict(INT4=False, FP8=False, BFLOAT=False, SHIFTED=False),
    "fp8": dict(INT4=False, FP8=True, BFLOAT=False, SHIFTED=False),
    "int4 float16": dict(INT4=True, FP8=False, BFLOAT=False, SHIFTED=False),
    "int4 bfloat16": dict(INT4=True, FP8=False, BFLOAT=True, SHIFTED=False),
    "int4 float16 shifted": dict(INT4=True, FP8=False, BFLOAT=False, SHIFTED=True),
    "int4 bfloat16 shifted": dict(INT4=True, FP8=False, BFLOAT=True, SHIFTED=True),
}


@triton.jit
def scale_of(word, BFLOAT: tl.constexpr):
    """The low 16 bits of words as a number."""
    if BFLOAT:
        number = (word << 16).to(tl.float32, bitcast=True)
    else:
        number = (word & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def zero_of(word, SHIFTED: tl.constexpr):
    """What is taken from 4-bit numbers before they are multiplied."""
    if SHIFTED:
        zero = tl.full(word.shape, 8, tl.int32)
    else:
        zero = word >> 16
    return zero


@triton.jit
def _times(total, product, sums, word, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr):
    """`total` plus a `product` of 4-bit numbers in units of their scale; `sums`: of the rows that went into it."""
    product *= scale_of(word, BFLOAT)
    if SHIFTED:
        product += scale_of(word >> 16, BFLOAT) * tl.expand_dims(sums, len(product.shape) - 2)
    return total + product


@triton.jit
def _sums(x, SHIFTED: tl.constexpr):
    """The sums of rows `x [.., K, M]`, where they are needed."""
    return tl.sum(x.to(tl.float32), len(x.shape) - 2) if SHIFTED else 0.0


@triton.jit
def _times_words(total, tile, first, place, inner, live, words, x, UNIT: tl.constexpr, SHARE: tl.constexpr,
                 EVEN: tl.constexpr, FAST: tl.constexpr, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr):  # fmt: skip
    """`total` plus the rows at `first + place`, in four spans of UNIT, times the four numbers of each word of `tile`.

    words: scales of the spans, of which SHARE in a row are the same."""
    zeros = (
        zero_of(words[0], SHIFTED),
        zero_of(words[1], SHIFTED),
        zero_of(words[2], SHIFTED),
        zero_of(words[3], SHIFTED),
    )
    a, b, c, d = four_bits(tile, zeros, x, FAST)
    xa = _rows(first, place, inner, live, EVEN)
    xb = _rows(first, place + UNIT, inner, live, EVEN)
    xc = _rows(first, place + 2 * UNIT, inner, live, EVEN)
    xd = _rows(first, place + 3 * UNIT, inner, live, EVEN)
    if SHARE == 1:
        total = _times(total, tl.dot(a, xa), _sums(xa, SHIFTED), words[0], BFLOAT, SHIFTED)
        total = _times(total, tl.dot(b, xb), _sums(xb, SHIFTED), words[1], BFLOAT, SHIFTED)
        total = _times(total, tl.dot(c, xc), _sums(xc, SHIFTED), words[2], BFLOAT, SHIFTED)
        total = _times(total, tl.dot(d, xd), _sums(xd, SHIFTED), words[3], BFLOAT, SHIFTED)
    else:
        low, low_sums = tl.dot(b, xb, tl.dot(a, xa)), _sums(xa, SHIFTED) + _sums(xb, SHIFTED)
        high_sums = _sums(xc, SHIFTED) + _sums(xd, SHIFTED)
        if SHARE == 2:
            total = _times(total, low, low_sums, words[0], BFLOAT, SHIFTED)
            total = _times(total, tl.dot(d, xd, tl.dot(c, xc)), high_sums, words[2], BFLOAT, SHIFTED)
        else:
            whole = tl.dot(d, xd, tl.dot(c, xc, low))
            total = _times(total, whole, low_sums + high_sums, words[0], BFLOAT, SHIFTED)
    return total


@triton.jit
def _rows(first, position, inner, given, EVEN: tl.constexpr):
    """Elements of the `given` rows, which begin at `first`; zeros for the others, and past the inner dimension.

    The others are not read: were they to read one that is given, all threads would read the same numbers."""
    inside = given & (position >= 0) if EVEN else given & (position < inner)
    return tl.load(first + position, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows"])  # one row would be read in smaller pieces
def _sliced_kernel(x, values, scales, bias, added, out, rows, outputs, inner, width, values_row, groups, tall,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, UNIT: tl.constexpr,
                   STAGES: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
                   INT4: tl.constexpr, FP8: tl.constexpr, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr,
                   FAST: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    piece, u, row = tl.arange(0, SLICES), tl.arange(0, UNIT), tl.minimum(n, outputs - 1)
    k = piece[:, None] * UNIT + u[None, :]
    first = values + row.to(tl.int64) * values_row
    tiles = first[None, :, None] + k[:, None, :]
    inputs, live = x + m[None, None, :] * inner, (m < rows)[None, None, :]
    scale_row = scales + (row // tall).to(tl.int64) * groups
    prefetch(first, width, SLICES * UNIT, OVERLAP, 64 if INT4 else 128)
    await_input(OVERLAP)
    total = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, width, SLICES * UNIT, num_stages=STAGES):
        tile = load(tiles + start, start + k[:, None, :], width, EVEN)
        if INT4:
            at = 4 * (start + piece * UNIT)
            a = tl.load(scale_row[None, :] + tl.minimum(at // GROUP, groups - 1)[:, None])[:, :, None]
            b, c, d = a, a, a
            if SHARE < 4:
                c = tl.load(scale_row[None, :] + tl.minimum((at + 2 * UNIT) // GROUP, groups - 1)[:, None])[:, :, None]
                d = c
            if SHARE == 1:
                b = tl.load(scale_row[None, :] + tl.minimum((at + UNIT) // GROUP, groups - 1)[:, None])[:, :, None]
                d = tl.load(scale_row[None, :] + tl.minimum((at + 3 * UNIT) // GROUP, groups - 1)[:, None])[:, :, None]
            place = at[:, None, None] + u[None, :, None]
            total = _times_words(total, tile, inputs, place, inner, live, (a, b, c, d), x, UNIT, SHARE, EVEN,
                                 FAST, BFLOAT, SHIFTED)  # fmt: skip
        else:
            place = start + k[:, :, None]
            given = _rows(inputs, place, inner, live, EVEN)
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
                 EVEN: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, INT4: tl.constexpr, FP8: tl.constexpr,
                 BFLOAT: tl.constexpr, SHIFTED: tl.constexpr, FAST: tl.constexpr, BIAS: tl.constexpr,
                 ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Program (n, s): tile n of the outputs over `part` bytes of each from s part on, `out [parts, rows, outputs]`."""
    m, n, u = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, UNIT)
    row, begin = tl.minimum(n, outputs - 1), tl.program_id(1) * part
    first = values + row.to(tl.int64) * values_row
    inputs, live = x + m[None, :] * inner, (m < rows)[None, :]
    scale_row = scales + (row // tall).to(tl.int64) * groups
    end = tl.minimum(begin + part, width)
    prefetch(first + begin, end - begin, 2 * UNIT, OVERLAP, 64 if INT4 else 128)
    await_input(OVERLAP)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, end, UNIT, num_stages=STAGES):
        tile = load(first[:, None] + start + u[None, :], start + u[None, :], width, EVEN)
        if INT4:
            a = tl.load(scale_row + 4 * start // GROUP)[:, None]
            b, c, d = a, a, a
            if SHARE < 4:
                c = tl.load(scale_row + (4 * start + 2 * UNIT) // GROUP)[:, None]
                d = c
            if SHARE == 1:
                b = tl.load(scale_row + (4 * start + UNIT) // GROUP)[:, None]
                d = tl.load(scale_row + (4 * start + 3 * UNIT) // GROUP)[:, None]
            place = 4 * start + u[:, None]
            total = _times_words(total, tile, inputs, place, inner, live, (a, b, c, d), x, UNIT, SHARE, EVEN,
                                 FAST, BFLOAT, SHIFTED)  # fmt: skip
        else:
            place = start + u[:, None]
            given = _rows(inputs, place, inner, live, EVEN)
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
    values = values if kind["INT4"] else values.view(torch.int8)
    unit = span_of(group, inner) if kind["INT4"] else UNIT if group >= inner or group % UNIT == 0 else LEAST_UNIT
    tensors, options = (rows, values, scales, bias, added), dict(BIAS=bias is not None, ADDED=added is not None)
    options |= overlapping(x.device)
    sizes = outputs, inner, width, values.stride(0), scales.shape[1], tall
    same = dict(UNIT=unit, GROUP=group if kind["INT4"] or group < inner else 0, FAST=converts_fast(x.device), **kind)
    same |= dict(SHARE=math.gcd(group // unit, 4) if kind["INT4"] else 0)
    stored, given = (2, 4) if kind["INT4"] else (1, 1)  # bytes of a number of `values`, and positions that it holds
    block_m = max(8, triton.next_power_of_2(len(rows)))
    if block_m <= SLICED_ROWS[kind["INT4"]]:
        deep = stages(x.device, SLICES * unit * (stored * BLOCK_N // 2 + block_m * given), 4 if block_m == 8 else 3)
        _sliced_kernel[(triton.cdiv(outputs, BLOCK_N),)](
            *tensors, out, len(rows), *sizes, BLOCK_M=block_m, BLOCK_N=BLOCK_N, SLICES=SLICES, STAGES=deep,
            EVEN=width % (SLICES * unit) == 0, num_warps=SLICES, **same, **options)  # fmt: skip
        return out, None
    block_n = WIDE_TILE_N if block_m <= 16 else TILE_N
    tiles = triton.cdiv(outputs, block_n)
    part, count = cut(width, unit, max(1, min(MOST_PARTS, PROGRAMS * multiprocessors(x.device) // tiles)))
    parts, of_parts = room_for(count, out, options)
    deep = stages(x.device, unit * (stored * block_n // 2 + block_m * given), 4 if kind["INT4"] or kind["FP8"] else 3)
    _tile_kernel[(tiles, count)](
        *tensors, parts, len(rows), *sizes, part, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=deep,
        EVEN=width % unit == 0, num_warps=4, **same, **of_parts)  # fmt: skip
    return out, add_parts(parts, count, bias, added, out, options, norm)
