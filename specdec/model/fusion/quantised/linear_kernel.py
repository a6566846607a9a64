"""Triton kernels for `specdec.model.fusion.quantised.linear`, built as those of `skinny_linear_kernel` are.

* One row: elementwise products with a few outputs, then sums.
* Up to SLICED_ROWS rows: tensor cores, each warp with a slice of the inner dimension; the slices are added at the end.
* More rows: larger tiles, in parts along the inner dimension, which `add_parts` adds up.

A unit is the run of bytes of one output that shares a scale, or of which each half byte does. Integers and e4m3 numbers
are exact in 16 bits, so a unit is multiplied as it is; scales, and zeros that are no integers, join in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.model.fusion.quantised.packed import HALF
from specdec.model.fusion.skinny_linear_kernel import (
    BLOCK_N,
    SLICED_ROWS,
    SLICES,
    add_parts,
    load,
    plus,
    prefetch,
    room_for,
    split,
    stages,
)

UNIT = 128  # bytes, where scales allow it
LAYOUTS = {
    "int8": dict(INT4=False, FP8=False, BFLOAT=False, SHIFTED=False),
    "fp8": dict(INT4=False, FP8=True, BFLOAT=False, SHIFTED=False),
    "int4 float16": dict(INT4=True, FP8=False, BFLOAT=False, SHIFTED=False),
    "int4 bfloat16": dict(INT4=True, FP8=False, BFLOAT=True, SHIFTED=False),
    "int4 float16 shifted": dict(INT4=True, FP8=False, BFLOAT=False, SHIFTED=True),
    "int4 bfloat16 shifted": dict(INT4=True, FP8=False, BFLOAT=True, SHIFTED=True),
}


@triton.jit
def _eight_bits(tile, FP8: tl.constexpr):
    """Bytes as float32: int8, or e4m3 by way of float16, which has the same fields with more bits."""
    if FP8:
        bits = tile.to(tl.int16)  # sign-extended: bit 15 is the sign
        half = ((bits & -32768) | ((bits & 127) << 7)).to(tl.float16, bitcast=True)
        numbers = half.to(tl.float32) * 256.0  # exponents are 7 and 15 above the true ones
    else:
        numbers = tile.to(tl.float32)
    return numbers


@triton.jit
def _scale(word, BFLOAT: tl.constexpr):
    """The low 16 bits of words as a number."""
    if BFLOAT:
        number = (word << 16).to(tl.float32, bitcast=True)
    else:
        number = (word & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _half_of_bytes(total, numbers, x, word, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr):
    """`total` plus `x [.., K, M]` times 4-bit `numbers [.., N, K]`, which have a scale and zero for each output."""
    if SHIFTED:
        product = tl.dot((numbers - 8).to(tl.float32).to(x.dtype), x) * _scale(word, BFLOAT)
        sums = tl.sum(x.to(tl.float32), len(x.shape) - 2)
        product += _scale(word >> 16, BFLOAT) * tl.expand_dims(sums, len(x.shape) - 2)
    else:
        product = tl.dot((numbers - (word >> 16)).to(tl.float32).to(x.dtype), x) * _scale(word, BFLOAT)
    return total + product


@triton.jit
def _unit_of_one_row(tile, x, word, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr):
    """4-bit numbers, times scales, times `x`, elementwise in float32."""
    if SHIFTED:
        weights = (tile - 8).to(tl.float32) * _scale(word, BFLOAT) + _scale(word >> 16, BFLOAT)
    else:
        weights = (tile - (word >> 16)).to(tl.float32) * _scale(word, BFLOAT)
    return weights * x.to(tl.float32)


@triton.jit
def _rows(first, position, inner, EVEN: tl.constexpr):
    """Elements of rows that begin at `first`; zeros past the inner dimension."""
    if EVEN:
        values = tl.load(first + position)
    else:
        values = tl.load(first + position, mask=position < inner, other=0.0)
    return values


@triton.jit
def _one_row_kernel(x, values, scales, bias, added, out, outputs, inner, width, values_row, groups, group, tall,
                    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
                    GROUPED: tl.constexpr, INT4: tl.constexpr, FP8: tl.constexpr, BFLOAT: tl.constexpr,
                    SHIFTED: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    n, unit, u = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, UNITS), tl.arange(0, UNIT)
    row, k = tl.minimum(n, outputs - 1), unit[:, None] * UNIT + u[None, :]
    first = values + row.to(tl.int64) * values_row
    scale_row = scales + (row // tall).to(tl.int64) * groups
    prefetch(first, width, UNITS * UNIT, OVERLAP, 128)
    await_input(OVERLAP)
    total = tl.zeros([BLOCK_N, UNITS, UNIT], tl.float32)
    for start in range(0, width, UNITS * UNIT):
        tile = load(first[:, None, None] + start + k[None, :, :], start + k[None, :, :], width, EVEN)
        if INT4:
            low = 2 * (start + unit * UNIT)  # the position of a unit's first number
            place = low[:, None] + u[None, :]
            words = scale_row[:, None] + tl.minimum(low // group, groups - 1)[None, :]
            total += _unit_of_one_row((tile & 15).to(tl.int32), _rows(x, place, inner, EVEN)[None, :, :],
                                      tl.load(words)[:, :, None], BFLOAT, SHIFTED)  # fmt: skip
            words = scale_row[:, None] + tl.minimum((low + UNIT) // group, groups - 1)[None, :]
            total += _unit_of_one_row((tile >> 4).to(tl.int32), _rows(x, place + UNIT, inner, EVEN)[None, :, :],
                                      tl.load(words)[:, :, None], BFLOAT, SHIFTED)  # fmt: skip
        else:
            product = _eight_bits(tile, FP8) * _rows(x, start + k, inner, EVEN)[None, :, :].to(tl.float32)
            if GROUPED:
                place = tl.minimum((start + unit * UNIT) // group, groups - 1)
                product *= tl.load(scale_row[:, None] + place[None, :])[:, :, None]
            total += product
    result = tl.sum(tl.sum(total, 2), 1)
    if not GROUPED:
        result *= tl.load(scale_row)
    result = plus(result, bias, n, n < outputs, BIAS)
    result = plus(result, added, n, n < outputs, ADDED)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < outputs)


@triton.jit
def _sliced_kernel(x, values, scales, bias, added, out, rows, outputs, inner, width, values_row, groups, group, tall,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, UNIT: tl.constexpr,
                   STAGES: tl.constexpr, EVEN: tl.constexpr, GROUPED: tl.constexpr, INT4: tl.constexpr,
                   FP8: tl.constexpr, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr, BIAS: tl.constexpr,
                   ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
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
            low = 2 * (start + piece * UNIT)
            place = low[:, None, None] + u[None, :, None]
            words = scale_row[None, :] + tl.minimum(low // group, groups - 1)[:, None]
            total = _half_of_bytes(total, (tile & 15).to(tl.int32), _rows(inputs, place, inner, EVEN),
                                   tl.load(words)[:, :, None], BFLOAT, SHIFTED)  # fmt: skip
            words = scale_row[None, :] + tl.minimum((low + UNIT) // group, groups - 1)[:, None]
            total = _half_of_bytes(total, (tile >> 4).to(tl.int32), _rows(inputs, place + UNIT, inner, EVEN),
                                   tl.load(words)[:, :, None], BFLOAT, SHIFTED)  # fmt: skip
        else:
            place = start + k[:, :, None]
            given = _rows(inputs, place, inner, EVEN)
            product = tl.dot(_eight_bits(tile, FP8).to(x.dtype.element_ty), given)
            if GROUPED:
                at = tl.minimum((start + piece * UNIT) // group, groups - 1)
                product *= tl.load(scale_row[None, :] + at[:, None])[:, :, None]
            total += product
    result = tl.sum(total, 0)
    if not GROUPED:
        result *= tl.load(scale_row)[:, None]
    place, inside = m[None, :] * outputs + n[:, None], (m < rows)[None, :] & (n < outputs)[:, None]
    result = plus(result, bias, n[:, None], (n < outputs)[:, None], BIAS)
    result = plus(result, added, place, inside, ADDED)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile_kernel(x, values, scales, bias, added, out, rows, outputs, inner, width, values_row, groups, group, tall,
                 part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
                 EVEN: tl.constexpr, GROUPED: tl.constexpr, INT4: tl.constexpr, FP8: tl.constexpr,
                 BFLOAT: tl.constexpr, SHIFTED: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
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
            total = _half_of_bytes(total, (tile & 15).to(tl.int32), _rows(inputs, place, inner, EVEN),
                                   tl.load(scale_row + 2 * start // group)[:, None],
                                   BFLOAT, SHIFTED)  # fmt: skip
            total = _half_of_bytes(total, (tile >> 4).to(tl.int32), _rows(inputs, place + UNIT, inner, EVEN),
                                   tl.load(scale_row + (2 * start + UNIT) // group)[:, None],
                                   BFLOAT, SHIFTED)  # fmt: skip
        else:
            place = start + u[:, None]
            given = _rows(inputs, place, inner, EVEN)
            product = tl.dot(_eight_bits(tile, FP8).to(x.dtype.element_ty), given)
            if GROUPED:
                product *= tl.load(scale_row + start // group)[:, None]
            total += product
    if not GROUPED:
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
    grouped = kind["INT4"] or group < inner
    unit = min(group, HALF) if kind["INT4"] else UNIT if group >= inner or group % UNIT == 0 else HALF
    tensors, options = (rows, values, scales, bias, added), dict(BIAS=bias is not None, ADDED=added is not None)
    options |= overlapping(x.device)
    sizes = outputs, inner, width, values.stride(0), scales.shape[1], group, tall
    same = dict(UNIT=unit, GROUPED=grouped, **kind)
    if len(rows) == 1:
        units = max(1, min(1024, triton.next_power_of_2(width)) // unit)
        block_n = max(1, 8192 // (units * unit))
        _one_row_kernel[(triton.cdiv(outputs, block_n),)](
            *tensors, out, *sizes, BLOCK_N=block_n, UNITS=units, EVEN=width % (units * unit) == 0, num_warps=8,
            **same, **options)  # fmt: skip
        return out, None
    if len(rows) <= SLICED_ROWS:
        deep = stages(x.device, SLICES * unit * (BLOCK_N // 2 + SLICED_ROWS * (1 + kind["INT4"])), 5)
        _sliced_kernel[(triton.cdiv(outputs, BLOCK_N),)](
            *tensors, out, len(rows), *sizes, BLOCK_M=SLICED_ROWS, BLOCK_N=BLOCK_N, SLICES=SLICES, STAGES=deep,
            EVEN=width % (SLICES * unit) == 0, num_warps=SLICES, **same, **options)  # fmt: skip
        return out, None
    block_m = max(16, triton.next_power_of_2(len(rows)))
    block_n, part, count = split(x.device, outputs, width, unit)
    parts, of_parts = room_for(count, out, options)
    deep = stages(x.device, unit * (block_n // 2 + block_m * (1 + kind["INT4"])), 6)
    _tile_kernel[(triton.cdiv(outputs, block_n), count)](
        *tensors, parts, len(rows), *sizes, part, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=deep,
        EVEN=width % unit == 0, num_warps=8 if block_m * block_n > 4096 else 4, **same, **of_parts)  # fmt: skip
    return out, add_parts(parts, count, bias, added, out, options, norm)
