"""Triton kernels for what a round does besides running models. On small tensors a launch costs more than its work, and each of these replaces several."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # scores that one program looks at


@triton.jit
def _peak(value, index):
    """The largest of the values, NaN before all, and the smallest index that has it."""
    nan = value != value
    largest = tl.max(tl.where(nan, float("-inf"), value), 0)
    broken = tl.max(nan.to(tl.int32), 0) > 0
    first = tl.min(tl.where(tl.where(broken, nan, value == largest), index, 2147483647), 0)
    return tl.where(broken, float("nan"), largest), first


@triton.jit
def _part_kernel(scores, values, indices, size, row_stride, parts, BLOCK: tl.constexpr):
    """The best of one block of one row."""
    row, part = tl.program_id(0), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores + row.to(tl.int64) * row_stride + index, mask=index < size, other=float("-inf")).to(tl.float32)
    value, index = _peak(value, tl.where(index < size, index, 2147483647))
    tl.store(values + row * parts + part, value)
    tl.store(indices + row * parts + part, index)


@triton.jit
def _merge_kernel(values, indices, best, highest, parts, PARTS: tl.constexpr):
    """The best of all parts of one row."""
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    value = tl.load(values + row * parts + part, mask=part < parts, other=float("-inf"))
    index = tl.load(indices + row * parts + part, mask=part < parts, other=2147483647)
    value, index = _peak(value, index)
    tl.store(best + row, index.to(tl.int64))
    tl.store(highest + row, value)


def launch_peak(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores [..., V]` -> (`argmax [...]` int64, `max [...]` float32), which is NaN where any score is."""
    rows, size = scores.reshape(-1, scores.shape[-1]), scores.shape[-1]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    parts = triton.cdiv(size, BLOCK)
    values = scores.new_empty(len(rows), parts, dtype=torch.float32)
    indices = scores.new_empty(len(rows), parts, dtype=torch.int32)
    best, highest = scores.new_empty(len(rows), dtype=torch.int64), scores.new_empty(len(rows), dtype=torch.float32)
    _part_kernel[(len(rows), parts)](rows, values, indices, size, rows.stride(0), parts, BLOCK, num_warps=4)
    _merge_kernel[(len(rows),)](values, indices, best, highest, parts, triton.next_power_of_2(parts), num_warps=1)
    return best.view(scores.shape[:-1]), highest.view(scores.shape[:-1])


@triton.jit
def _append_kernel(tokens, lengths, limits, rounds, alive, emitted, counts, ends, capacity, width, num_ends, WIDTH: tl.constexpr, ENDS: tl.constexpr):
    row, place = tl.program_id(0), tl.arange(0, WIDTH)
    length, limit, lives = tl.load(lengths + row), tl.load(limits + row), tl.load(alive + row) > 0
    said = tl.load(emitted + row * width + place, mask=place < width, other=0)
    end = tl.arange(0, ENDS)
    known = tl.load(ends + end, mask=end < num_ends, other=0)
    is_end = tl.max(((said[:, None] == known[None, :]) & (end < num_ends)[None, :]).to(tl.int32), 1) > 0
    first_end = tl.min(tl.where(is_end & (place < width), place, width), 0)
    kept = tl.minimum(tl.load(counts + row) + 1, limit - length)
    ended = first_end < kept
    kept = tl.where(lives, tl.where(ended, first_end + 1, kept), 0)
    tl.debug_barrier()  # every thread has read what is overwritten now
    tl.store(tokens + row.to(tl.int64) * capacity + length + place, said, mask=place < kept)
    tl.store(lengths + row, length + kept)
    tl.store(rounds + row, tl.load(rounds + row) + lives.to(tl.int64))
    tl.store(alive + row, (lives & (ended == 0) & (length + kept < limit)).to(tl.uint8))


def launch_append(tokens: Tensor, lengths: Tensor, limits: Tensor, rounds: Tensor, alive: Tensor, emitted: Tensor, counts: Tensor, ends: Tensor) -> None:
    """See `specdec.drafters.device_context.append`."""
    capacity, width, num_ends = tokens.shape[1], emitted.shape[1], len(ends)
    blocks = triton.next_power_of_2(width), triton.next_power_of_2(max(1, num_ends))
    _append_kernel[(len(lengths),)](tokens, lengths, limits, rounds, alive.view(torch.uint8), emitted.contiguous(), counts, ends, capacity, width, num_ends,
                                    *blocks, num_warps=1)  # fmt: skip
