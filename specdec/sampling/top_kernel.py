"""The largest scores of each row by a Triton kernel, whose one launch replaces several of small operations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping

ONE_PROGRAM_WIDTH = 16384  # longest row that one program reads alone
BLOCK = 2048  # scores that a program reads of a longer row


@triton.jit
def _peak(value, index):
    """The largest value, NaN counting as the largest of all, and the smallest index that has it."""
    nan = value != value
    largest = tl.max(tl.where(nan, float("-inf"), value), 0)
    broken = tl.max(nan.to(tl.int32), 0) > 0
    first = tl.min(tl.where(tl.where(broken, nan, value == largest), index, 2147483647), 0)
    return tl.where(broken, float("nan"), largest), first


@triton.jit
def largest_of(value, index, values, indices, K: tl.constexpr):
    """Store the K largest values, in falling order, and their indices."""
    for rank in tl.static_range(K):
        largest, first = _peak(value, index)
        tl.store(values + rank, largest)
        tl.store(indices + rank, first.to(indices.dtype.element_ty))
        value = tl.where(index == first, float("-inf"), value)
        index = tl.where(index == first, 2147483647, index)  # so that another one with -inf comes before it


@triton.jit
def _part_kernel(
    scores, values, indices, size, row_stride, parts, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """The K largest of one block of one row."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores + row * row_stride + index, mask=index < size, other=float("-inf")).to(tl.float32)
    index = tl.where(index < size, index, 2147483647)
    first = (row * parts + part) * K
    largest_of(value, index, values + first, indices + first, K)


@triton.jit
def _merge_kernel(
    part_values, part_indices, values, indices, found, K: tl.constexpr, FOUND: tl.constexpr, OVERLAP: tl.constexpr
):
    """The K largest among those of all blocks of one row."""
    await_input(OVERLAP)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, FOUND)
    value = tl.load(part_values + row * found + place, mask=place < found, other=float("-inf"))
    index = tl.load(part_indices + row * found + place, mask=place < found, other=2147483647)
    largest_of(value, index, values + row * K, indices + row * K, K)


def launch_top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `specdec.sampling.draws.top`; values are float32."""
    rows, size = scores.reshape(-1, scores.shape[-1]), scores.shape[-1]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    block = triton.next_power_of_2(size) if size <= ONE_PROGRAM_WIDTH else BLOCK
    parts, shape, overlap = triton.cdiv(size, block), (*scores.shape[:-1], count), overlapping(scores.device)
    values, indices = found = scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int64)
    if parts > 1:
        of_parts = len(rows), parts * count
        found = scores.new_empty(of_parts, dtype=torch.float32), scores.new_empty(of_parts, dtype=torch.int32)
    _part_kernel[(len(rows), parts)](
        rows, *found, size, rows.stride(0), parts, count, block, num_warps=min(16, max(1, block // 512)), **overlap
    )
    if parts > 1:
        block = triton.next_power_of_2(parts * count)
        _merge_kernel[(len(rows),)](
            *found, values, indices, parts * count, count, block, num_warps=min(4, max(1, block // 128)), **overlap
        )
    return values, indices
