"""A Triton kernel that writes the 16-bit matrix which packed numbers stand for: one pass over both."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.model.fusion.quantised.linear_kernel import LAYOUTS, scale_of, zero_of
from specdec.model.fusion.quantised.numbers_kernel import converts_fast, eight_bits, four_bits
from specdec.model.fusion.quantised.packed import span_of

BLOCK_N, BLOCK_K = 4, 512  # outputs and stored numbers of a program


@triton.jit
def _store_span(first, place, inside, numbers, word, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr):
    """Store 4-bit numbers, less their zeros, times their scale."""
    result = numbers.to(tl.float32) * scale_of(word, BFLOAT)
    if SHIFTED:
        result += scale_of(word >> 16, BFLOAT)
    tl.store(first + place, result.to(first.dtype.element_ty), mask=inside)


@triton.jit
def _matrix_kernel(values, scales, out, outputs, width, inner, values_row, groups, tall, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
                   FP8: tl.constexpr, BFLOAT: tl.constexpr, SHIFTED: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, row = (n < outputs)[:, None] & (k < width)[None, :], tl.minimum(n, outputs - 1).to(tl.int64)[:, None]
    tile = tl.load(values + row * values_row + k[None, :], mask=inside, other=0, eviction_policy="evict_first")
    scale_row, first = scales + row // tall * groups, out + row * inner
    if INT4:
        place = (k // SPAN * (4 * SPAN) + k % SPAN)[None, :]
        a = tl.load(scale_row + tl.minimum(place // GROUP, groups - 1))
        b = tl.load(scale_row + tl.minimum((place + SPAN) // GROUP, groups - 1))
        c = tl.load(scale_row + tl.minimum((place + 2 * SPAN) // GROUP, groups - 1))
        d = tl.load(scale_row + tl.minimum((place + 3 * SPAN) // GROUP, groups - 1))
        zeros = (zero_of(a, SHIFTED), zero_of(b, SHIFTED), zero_of(c, SHIFTED), zero_of(d, SHIFTED))
        na, nb, nc, nd = four_bits(tile, zeros, out, FAST)
        _store_span(first, place, inside, na, a, BFLOAT, SHIFTED)
        _store_span(first, place + SPAN, inside, nb, b, BFLOAT, SHIFTED)
        _store_span(first, place + 2 * SPAN, inside, nc, c, BFLOAT, SHIFTED)
        _store_span(first, place + 3 * SPAN, inside, nd, d, BFLOAT, SHIFTED)
    else:
        scale = tl.load(scale_row + tl.minimum(k // GROUP, groups - 1)[None, :])
        result = eight_bits(tile, out, FP8, FAST).to(tl.float32) * scale
        tl.store(first + k[None, :], result.to(out.dtype.element_ty), mask=inside)


def launch_matrix(values: Tensor, scales: Tensor, layout: str, group: int, tall: int, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` in `dtype`, 16 bits; arguments are those of `launch_quantised_linear`."""
    kind = LAYOUTS[layout]
    outputs, width = values.shape
    inner = 4 * width if kind["INT4"] else width
    out = torch.empty(outputs, inner, dtype=dtype, device=values.device)
    if out.numel():
        values = values if kind["INT4"] else values.view(torch.int8)
        _matrix_kernel[(triton.cdiv(outputs, BLOCK_N), triton.cdiv(width, BLOCK_K))](
            values, scales, out, outputs, width, inner, values.stride(0), scales.shape[1], tall, BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K, SPAN=span_of(group, inner), GROUP=group, FAST=converts_fast(values.device), num_warps=4,
            **kind)  # fmt: skip
    return out
