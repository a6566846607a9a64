"""Top-k and top-p by Triton kernels that do not sort: `warpers.keep_upper`.

Both keep an upper part of the tokens, ordered by score and then by index, so all that is wanted is the lowest token
that stays. Integers that sort like the scores are bracketed: each of PASSES launches tries PIVOTS integers between the
bounds that the one before has left, a program for each block of each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.draw_kernel import launch_sums

PIVOTS, PASSES = 16, 8  # 17 ** 8 is more than there are float32 numbers


@triton.jit
def _key(score):
    """An int64 that sorts like the float32 score; NaN sorts highest, and -0 like 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 2147483647, ordered).to(tl.int64)


@triton.jit
def _goal(largest, sums, numbers, row, size, parts, MASS: tl.constexpr, PARTS: tl.constexpr):
    """A row's largest score, and how much may go: weight with MASS, else a number of tokens."""
    part, number = tl.arange(0, PARTS), tl.load(numbers + row)
    of_part = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(of_part, 0)
    if MASS:
        scale = tl.where(of_part == float("-inf"), 0.0, tl.exp((of_part - top).to(tl.float64)))
        limit = number * tl.sum(tl.load(sums + row * parts + part, mask=part < parts, other=0.0) * scale, 0)
    else:
        limit = size - tl.minimum(number, size)
    return top, limit


@triton.jit
def _pivot(low, high, step, PIVOTS: tl.constexpr):
    return low + (high - low) * step // (PIVOTS + 1)


@triton.jit
def _narrowed(low, high, under, partial, row, parts, limit, PIVOTS: tl.constexpr, PARTS: tl.constexpr):
    """The bounds after the sums of all blocks up to each pivot, and the weight of the keys up to the lower one."""
    rank, part = tl.arange(0, PIVOTS), tl.arange(0, PARTS)
    places = partial + (row * parts + part)[:, None] * PIVOTS + rank[None, :]
    sums = tl.sum(tl.load(places, mask=(part < parts)[:, None], other=0.0), 0)
    pivots = _pivot(low, high, (rank + 1).to(tl.int64), PIVOTS)
    fits = (sums <= limit) & (pivots > low)
    under = tl.maximum(under, tl.max(tl.where(fits, sums, 0.0), 0))
    above = tl.min(tl.where((sums <= limit) | (pivots <= low), high, pivots), 0)  # sums may be NaN
    return tl.max(tl.where(fits, pivots, low), 0), above, under


@triton.jit
def _weight(score, top, MASS: tl.constexpr):
    """With MASS exp(score - top), 0 at -inf; else 1."""
    if MASS:
        return tl.where(score == float("-inf"), 0.0, tl.exp(score - top))
    return tl.where(score == score, 1.0, 1.0)


@triton.jit
def _narrow_kernel(
    scores, largest, sums, numbers, bounds, unders, partial, next_bounds, next_unders, next_partial, size, row_stride,
    parts, FIRST: tl.constexpr, MASS: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One pass: take over the sums of the pass before, and sum one block of one row up to each new pivot."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top, limit = _goal(largest, sums, numbers, row, size, parts, MASS, PARTS)
    if FIRST:
        low, high, under = tl.full((), -2147483649, tl.int64), _key(top), tl.zeros((), tl.float64)
    else:
        low, high, under = tl.load(bounds + 2 * row), tl.load(bounds + 2 * row + 1), tl.load(unders + row)
        low, high, under = _narrowed(low, high, under, partial, row, parts, limit, PIVOTS, PARTS)
    if part == 0:
        tl.store(next_bounds + 2 * row, low)
        tl.store(next_bounds + 2 * row + 1, high)
        tl.store(next_unders + row, under)
    place = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row * row_stride + place, mask=place < size, other=float("-inf"))
    weight, key = tl.where(place < size, _weight(score, top, MASS), 0.0), _key(score)
    for step in tl.static_range(1, PIVOTS + 1):
        up_to = tl.sum(tl.where(key <= _pivot(low, high, step, PIVOTS), weight, 0.0), 0)
        tl.store(next_partial + (row * parts + part) * PIVOTS + step - 1, up_to.to(tl.float64))


@triton.jit
def _ties_kernel(
    scores, largest, sums, numbers, bounds, unders, partial, keys, gone, ties, size, row_stride, parts,
    MASS: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """After the last pass: the key of the lowest score that stays, what may go of its weight, and its number in one
    block."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, limit = _goal(largest, sums, numbers, row, size, parts, MASS, PARTS)
    low, high, under = tl.load(bounds + 2 * row), tl.load(bounds + 2 * row + 1), tl.load(unders + row)
    low, high, under = _narrowed(low, high, under, partial, row, parts, limit, PIVOTS, PARTS)
    if part == 0:
        tl.store(keys + row, high)
        tl.store(gone + row, limit - under)
    place = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row * row_stride + place, mask=place < size, other=float("-inf"))
    tl.store(ties + row * parts + part, tl.sum(((_key(score) == high) & (place < size)).to(tl.int32), 0))


@triton.jit
def _mask_kernel(
    scores, largest, keys, gone, ties, kept, filtered, size, row_stride, parts,
    MASS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Scores of one block of one row, `filtered` where they go. Of equal scores the first go; the last one stays."""
    await_input(OVERLAP)
    row, part, every = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, PARTS)
    lowest = tl.load(keys + row)
    place = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row * row_stride + place, mask=place < size, other=float("-inf"))
    key = _key(score)
    goes = key < lowest
    if MASS:
        top = tl.max(tl.load(largest + row * parts + every, mask=every < parts, other=float("-inf")), 0)
        counts = tl.load(ties + row * parts + every, mask=every < parts, other=0)
        equal = key == lowest
        order = tl.cumsum(equal.to(tl.int32), 0) + tl.sum(tl.where(every < part, counts, 0), 0)  # from 1 on
        one = _weight(score, top, MASS).to(tl.float64)
        goes = goes | (equal & (order * one <= tl.load(gone + row)) & (order < tl.sum(counts, 0)))
    tl.store(kept + row * size + place, tl.where(goes, filtered, score), mask=place < size)


def launch_keep_upper(scores: Tensor, numbers: Tensor, mass: bool, filter_value: float) -> Tensor:
    """See `specdec.sampling.warpers.keep_upper`; scores `[M, V]` float32, numbers `[M]` float64."""
    (rows, size), overlap = scores.shape, overlapping(scores.device)
    scores, numbers = scores if scores.stride(1) == 1 else scores.contiguous(), numbers.contiguous()
    block, largest, sums = launch_sums(scores)
    parts = largest.shape[1]
    shape = dict(BLOCK=block, PARTS=triton.next_power_of_2(parts), num_warps=min(8, max(1, block // 512)), **overlap)
    grid, whole = (rows, parts), torch.int64
    bounds, unders = scores.new_empty(2, rows, 2, dtype=whole), scores.new_empty(2, rows, dtype=torch.float64)
    partial = scores.new_empty(2, rows, parts, PIVOTS, dtype=torch.float64)
    of_row = scores, largest, sums, numbers
    for index in range(PASSES):
        old, new = (index + 1) % 2, index % 2
        _narrow_kernel[grid](
            *of_row, bounds[old], unders[old], partial[old], bounds[new], unders[new], partial[new], size,
            scores.stride(0), parts, FIRST=index == 0, MASS=mass, PIVOTS=PIVOTS, **shape,
        )  # fmt: skip
    last = (PASSES - 1) % 2
    keys, gone = scores.new_empty(rows, dtype=whole), scores.new_empty(rows, dtype=torch.float64)
    ties, kept = scores.new_empty(rows, parts, dtype=torch.int32), scores.new_empty(rows, size)
    _ties_kernel[grid](
        *of_row, bounds[last], unders[last], partial[last], keys, gone, ties, size, scores.stride(0), parts,
        MASS=mass, PIVOTS=PIVOTS, **shape,
    )  # fmt: skip
    _mask_kernel[grid](
        scores, largest, keys, gone, ties, kept, filter_value, size, scores.stride(0), parts, MASS=mass, **shape
    )
    return kept
