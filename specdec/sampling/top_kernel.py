"""Triton kernels for what a round does besides running models. On small tensors a launch costs more than its work, and each of these replaces several."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping

WHOLE = 16384  # scores of a row that one program looks at alone
BLOCK = 2048  # and of a longer row


@triton.jit
def _peak(value, index):
    """The largest of the values, NaN before all, and the smallest index that has it."""
    nan = value != value
    largest = tl.max(tl.where(nan, float("-inf"), value), 0)
    broken = tl.max(nan.to(tl.int32), 0) > 0
    first = tl.min(tl.where(tl.where(broken, nan, value == largest), index, 2147483647), 0)
    return tl.where(broken, float("nan"), largest), first


@triton.jit
def _top(value, index, values, indices, K: tl.constexpr):
    """Write down the K largest, one after the other."""
    for rank in tl.static_range(K):
        largest, first = _peak(value, index)
        tl.store(values + rank, largest)
        tl.store(indices + rank, first.to(indices.dtype.element_ty))
        value = tl.where(index == first, float("-inf"), value)
        index = tl.where(index == first, 2147483647, index)  # so that another one with -inf comes before it


@triton.jit
def _part_kernel(scores, values, indices, size, row_stride, parts, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """The best of one block of one row."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores + row * row_stride + index, mask=index < size, other=float("-inf")).to(tl.float32)
    index = tl.where(index < size, index, 2147483647)
    _top(value, index, values + (row * parts + part) * K, indices + (row * parts + part) * K, K)


@triton.jit
def _merge_kernel(part_values, part_indices, values, indices, found, K: tl.constexpr, FOUND: tl.constexpr, OVERLAP: tl.constexpr):
    """The best of what the parts of one row have found."""
    await_input(OVERLAP)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, FOUND)
    value = tl.load(part_values + row * found + place, mask=place < found, other=float("-inf"))
    index = tl.load(part_indices + row * found + place, mask=place < found, other=2147483647)
    _top(value, index, values + row * K, indices + row * K, K)


def launch_top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `specdec.sampling.draws.top`; values come in float32."""
    rows, size = scores.reshape(-1, scores.shape[-1]), scores.shape[-1]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    block = triton.next_power_of_2(size) if size <= WHOLE else BLOCK
    parts, shape, overlap = triton.cdiv(size, block), (*scores.shape[:-1], count), overlapping(scores.device)
    values, indices = found = scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int64)
    if parts > 1:
        of_parts = len(rows), parts * count
        found = scores.new_empty(of_parts, dtype=torch.float32), scores.new_empty(of_parts, dtype=torch.int32)
    _part_kernel[(len(rows), parts)](rows, *found, size, rows.stride(0), parts, count, block, num_warps=min(16, max(1, block // 512)), **overlap)
    if parts > 1:
        block = triton.next_power_of_2(parts * count)
        _merge_kernel[(len(rows),)](*found, values, indices, parts * count, count, block, num_warps=min(4, max(1, block // 128)), **overlap)
    return values, indices


@triton.jit
def _append_kernel(tokens, lengths, limits, rounds, alive, emitted, counts, ends, capacity, width, num_ends, WIDTH: tl.constexpr, ENDS: tl.constexpr,
                   OVERLAP: tl.constexpr):  # fmt: skip
    await_input(OVERLAP)
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
    """See `specdec.requests.rows.append`."""
    capacity, width, num_ends = tokens.shape[1], emitted.shape[1], len(ends)
    blocks = triton.next_power_of_2(width), triton.next_power_of_2(max(1, num_ends))
    _append_kernel[(len(lengths),)](tokens, lengths, limits, rounds, alive.view(torch.uint8), emitted.contiguous(), counts, ends, capacity, width, num_ends,
                                    *blocks, num_warps=1, **overlapping(tokens.device))  # fmt: skip


@triton.jit
def _follow_kernel(tokens, likely, parent, path, depth, valid, counts, accepted, following, emitted, size, deepest, parent_row, path_row, depth_row, valid_row,
                   SIZE: tl.constexpr, PATH: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One row; tables with row stride 0 serve all."""
    await_input(OVERLAP)
    row, node, place = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE), tl.arange(0, PATH)
    tokens, likely, inside = tokens + row * size, likely + row * size, node < size
    parent, path, depth, valid = parent + row * parent_row, path + row * path_row, depth + row * depth_row, valid + row * valid_row
    level = tl.load(depth + node, mask=inside, other=0)
    kept = inside & (tl.load(valid + node, mask=inside, other=0) > 0)
    for above in range(deepest):
        on_path = tl.load(path + node * deepest + above, mask=inside, other=0)
        right = tl.load(tokens + on_path, mask=inside, other=0) == tl.load(likely + tl.load(parent + on_path, mask=inside, other=0), mask=inside, other=0)
        right = right & (tl.load(valid + on_path, mask=inside, other=0) > 0)
        kept = kept & ((above >= level) | right)
    level = tl.where(kept, level, -1)
    end = tl.min(tl.where(level == tl.max(level, 0), node, SIZE), 0)
    count, after = tl.load(depth + end), tl.load(likely + end)
    passed = tl.load(path + end * deepest + place, mask=place < deepest, other=0)
    said = tl.load(tokens + passed, mask=place < deepest, other=0)
    tl.store(counts + row, count)
    tl.store(following + row, after)
    tl.store(accepted + row * deepest + place, passed, mask=place < deepest)
    tl.store(emitted + row * (deepest + 1) + place, tl.where(place < count, said, after), mask=place <= deepest)


def launch_follow(tokens: Tensor, likely: Tensor, parent: Tensor, path: Tensor, depth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `specdec.acceptance.greedy.follow`: counts `[B]`, path `[B, E]`, next tokens `[B]`, emitted tokens `[B, E + 1]`."""
    (rows, size), deepest = tokens.shape, path.shape[2]
    tables = [parent, path, depth, valid.view(torch.uint8)]
    tables = [table if table[0].is_contiguous() else table.contiguous() for table in tables]
    counts, accepted = tokens.new_empty(rows), tokens.new_empty(rows, deepest)
    following, emitted = tokens.new_empty(rows), tokens.new_empty(rows, deepest + 1)
    strides = [0 if len(table) == 1 else table.stride(0) for table in tables]
    block = triton.next_power_of_2(size)
    _follow_kernel[(rows,)](tokens.contiguous(), likely.contiguous(), *tables, counts, accepted, following, emitted, size, deepest, *strides, block,
                            triton.next_power_of_2(deepest + 1), num_warps=min(4, max(1, block // 64)), **overlapping(tokens.device))  # fmt: skip
    return counts, accepted, following, emitted
