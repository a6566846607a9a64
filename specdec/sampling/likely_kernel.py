"""The likeliest tokens of each row and their log-probabilities by a Triton kernel that reads the scores once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.top_kernel import BLOCK, ONE_PROGRAM_WIDTH, _peak, _top


@triton.jit
def _log_total(largest, sums):
    """The logarithm of the sum of all exp(score), from each block's largest score m and sum of exp(score - m)."""
    top = tl.max(largest, 0)
    factors = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - top))
    return top + tl.log(tl.sum(sums * factors, 0))


@triton.jit
def _likely(value, index, log_total, values, indices, K: tl.constexpr):
    """Store the K largest values less `log_total`, in falling order, and their indices."""
    for rank in tl.static_range(K):
        largest, first = _peak(value, index)
        likely = tl.where(largest - log_total > 0.0, 0.0, largest - log_total)  # keeps NaN
        tl.store(values + rank, tl.where(largest == float("-inf"), largest, likely))
        tl.store(indices + rank, first.to(tl.int64))
        value = tl.where(index == first, float("-inf"), value)
        index = tl.where(index == first, 2147483647, index)


@triton.jit
def _sums(value):
    """The largest value, and the sum of exp(value - it): 0 where all are -inf."""
    top = tl.max(value, 0)
    return top, tl.where(top == float("-inf"), 0.0, tl.sum(tl.exp(value - top), 0))


@triton.jit
def _row_kernel(scores, values, indices, size, row_stride, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row that a program reads alone."""
    await_input(OVERLAP)
    row, index = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(scores + row * row_stride + index, mask=index < size, other=float("-inf")).to(tl.float32)
    index = tl.where(index < size, index, 2147483647)
    top, total = _sums(value)
    _likely(value, index, top + tl.log(total), values + row * K, indices + row * K, K)


@triton.jit
def _part_kernel(
    scores, values, indices, largest, sums, size, row_stride, parts,
    K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The K largest of one block of one row, and its sums."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores + row * row_stride + index, mask=index < size, other=float("-inf")).to(tl.float32)
    index = tl.where(index < size, index, 2147483647)
    top, total = _sums(value)
    tl.store(largest + row * parts + part, top)
    tl.store(sums + row * parts + part, total)
    _top(value, index, values + (row * parts + part) * K, indices + (row * parts + part) * K, K)


@triton.jit
def _merge_kernel(
    part_values, part_indices, largest, sums, values, indices, found, parts,
    K: tl.constexpr, FOUND: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The K largest among those of all blocks of one row."""
    await_input(OVERLAP)
    row, place, part = tl.program_id(0).to(tl.int64), tl.arange(0, FOUND), tl.arange(0, PARTS)
    tops = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    total = _log_total(tops, tl.load(sums + row * parts + part, mask=part < parts, other=0.0))
    value = tl.load(part_values + row * found + place, mask=place < found, other=float("-inf"))
    index = tl.load(part_indices + row * found + place, mask=place < found, other=2147483647)
    _likely(value, index, total, values + row * K, indices + row * K, K)


def launch_likely(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `specdec.sampling.draws.top_log_probs`; values are float32."""
    rows, size = scores.reshape(-1, scores.shape[-1]), scores.shape[-1]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    shape, overlap = (*scores.shape[:-1], count), overlapping(scores.device)
    make = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=scores.device)
    values, indices = make(shape), make(shape, dtype=torch.int64)
    if size <= ONE_PROGRAM_WIDTH:
        block = triton.next_power_of_2(size)
        warps = min(16, max(1, block // 512))
        _row_kernel[(len(rows),)](rows, values, indices, size, rows.stride(0), count, block, num_warps=warps, **overlap)
        return values, indices
    parts = triton.cdiv(size, BLOCK)
    found, places = make(len(rows), parts * count), make(len(rows), parts * count, dtype=torch.int32)
    sums = make(len(rows), parts), make(len(rows), parts)
    _part_kernel[(len(rows), parts)](
        rows, found, places, *sums, size, rows.stride(0), parts, count, BLOCK, num_warps=4, **overlap
    )
    block = triton.next_power_of_2(parts * count)
    _merge_kernel[(len(rows),)](
        found, places, *sums, values, indices, parts * count, parts, count, block, triton.next_power_of_2(parts),
        num_warps=min(4, max(1, block // 128)), **overlap
    )  # fmt: skip
    return values, indices
