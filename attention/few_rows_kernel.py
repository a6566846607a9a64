"""Triton kernels behind `attention.few_rows`: every weight is read once, straight through, and many are on their way at any time.

A single row is multiplied by a few rows of the matrix number by number. Several rows go through the matrix units, each warp with a slice of the
inner dimension, and the slices are added at the end. Where the hardware can, a kernel starts while the one before it ends and asks for its
first weights before it waits for its input. Weights must therefore not be what the kernel directly before has written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.overlap_kernel import await_input, overlapping
from attention.paged_kernel import shared_memory

BLOCK_N, SLICES, BLOCK_K = 16, 4, 128  # of the weights that a program of several rows multiplies at a time: the fastest of 44 on an H200


@triton.jit
def _load(pointers, column, inner, EVEN: tl.constexpr):
    """Weights, which nobody reads again soon; zeros behind the end of the inner dimension."""
    if EVEN:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        tile = tl.load(pointers, mask=column < inner, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _one_row_kernel(x, weight, bias, out, outputs, inner, weight_row, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
                    BIAS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weights = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * weight_row + k[None, :]
    tile = _load(weights, k[None, :], inner, EVEN)
    await_input(OVERLAP)
    total = tile.to(tl.float32) * tl.load(x + k, mask=k < inner, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK_K, inner, BLOCK_K):
        tile = _load(weights + start, start + k[None, :], inner, EVEN)
        total += tile.to(tl.float32) * tl.load(x + start + k, mask=start + k < inner, other=0.0).to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < outputs)


@triton.jit
def _few_rows_kernel(x, weight, bias, out, rows, outputs, inner, weight_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
                     BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    first = weight + tl.minimum(n, outputs - 1).to(tl.int64) * weight_row
    weights = first[None, :, None] + k[:, None, :]
    inputs = x + tl.minimum(m, rows - 1)[None, None, :] * inner + k[:, :, None]
    if OVERLAP:
        line = tl.arange(0, SLICES * BLOCK_K // 64) * 64  # 128 bytes
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [first[:, None] + tl.minimum(line, inner - 1)[None, :]],
                                  dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip
    await_input(OVERLAP)
    total = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, inner, SLICES * BLOCK_K, num_stages=STAGES):
        tile = _load(weights + start, start + k[:, None, :], inner, EVEN)
        if EVEN:
            values = tl.load(inputs + start)
        else:
            values = tl.load(inputs + start, mask=start + k[:, :, None] < inner, other=0.0)
        total = tl.dot(tile, values, total)
    result = tl.sum(total, 0)
    if BIAS:
        result += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(out + m[None, :] * outputs + n[:, None], result.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


def launch_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, most: int) -> Tensor:
    """`x [..., in]` of up to `most` rows, a power of two, `weight [out, in]`, `bias [out]` -> `[..., out]`."""
    outputs, inner = weight.shape
    rows = x.reshape(-1, inner).contiguous()
    out, options = x.new_empty(*x.shape[:-1], outputs), dict(BIAS=bias is not None, **overlapping(x.device))
    if len(rows) == 1:
        block_k = min(2048, triton.next_power_of_2(inner))
        while block_k > 256 and inner % block_k:  # smaller pieces are better than a mask
            block_k //= 2
        block_n = max(1, 8192 // max(block_k, 512))
        _one_row_kernel[(triton.cdiv(outputs, block_n),)](
            rows, weight, bias, out, outputs, inner, weight.stride(0), BLOCK_N=block_n, BLOCK_K=block_k, EVEN=inner % block_k == 0, num_warps=8, **options
        )
    else:
        _few_rows_kernel[(triton.cdiv(outputs, BLOCK_N),)](
            rows, weight, bias, out, len(rows), outputs, inner, weight.stride(0), BLOCK_M=most, BLOCK_N=BLOCK_N, SLICES=SLICES, BLOCK_K=BLOCK_K,
            STAGES=_stages(x.device, most), EVEN=inner % (SLICES * BLOCK_K) == 0, num_warps=SLICES, **options)  # fmt: skip
    return out


def _stages(device: torch.device, most: int) -> int:
    """How many pieces of weights may be on their way at once: as many as fit, up to five."""
    piece = SLICES * BLOCK_K * (BLOCK_N + most) * 2  # bytes
    return max(1, min(5, shared_memory(device) // piece))
