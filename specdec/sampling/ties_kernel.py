"""What stays of rows that top-k or top-p cut, by Triton kernels: of equal scores top-p drops the first ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.scores_kernel import block_of, divided, grid_of, of_key, weight_of
from specdec.sampling.threshold_kernel import launch_lowest, load_keys


@triton.jit
def _ties_kernel(
    logits, heat, cuts, bands, lowest, largest, sums, ties, size, row_stride, parts, SPAN: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """For some blocks of one row: the largest score that may stay, the sum of exp(score - it) above the lowest key that
    does, and how many tokens have that key."""
    await_input(OVERLAP)
    row, low = tl.program_id(0).to(tl.int64), tl.load(lowest + 2 * tl.program_id(0).to(tl.int64))
    for part in range(tl.program_id(1) * SPAN, tl.minimum(tl.program_id(1) * SPAN + SPAN, parts)):
        place = part * BLOCK + tl.arange(0, BLOCK)
        key, _, score = load_keys(
            logits, heat, cuts, bands, 0.0, row, place, size, row_stride, 0.0, 1, SHIFT, HEATED, CUT, BANDED
        )
        own = tl.max(tl.where(key >= low, score, float("-inf")), 0)
        weight = tl.where(key > low, weight_of(score, own), 0.0)
        tl.store(largest + row * parts + part, own)
        tl.store(sums + row * parts + part, tl.sum(weight.to(tl.float64), 0))
        tl.store(ties + row * parts + part, tl.sum(((key == low) & (score > float("-inf"))).to(tl.int32), 0))


@triton.jit
def _place_kernel(
    logits, heat, cuts, bands, lowest, largest, sums, ties, found, size, row_stride, parts, PARTS: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row's place of the first token with the lowest key that stays; adds the weights of those that do."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    low, dropped = tl.load(lowest + 2 * row), tl.load(lowest + 2 * row + 1)
    counts = tl.load(ties + row * parts + part, mask=part < parts, other=0)
    before, first = tl.cumsum(counts, 0) - counts, tl.zeros((), tl.int32)
    if dropped > 0:
        chosen = tl.max(tl.where((before <= dropped) & (counts > 0), part, 0), 0)
        place = chosen * BLOCK + tl.arange(0, BLOCK)
        key, _, score = load_keys(
            logits, heat, cuts, bands, 0.0, row, place, size, row_stride, 0.0, 1, SHIFT, HEATED, CUT, BANDED
        )
        equal = (key == low) & (score > float("-inf"))
        order = tl.cumsum(equal.to(tl.int32), 0) + tl.sum(tl.where(part == chosen, before, 0), 0)  # from 1 on
        first = tl.min(tl.where(equal & (order > dropped), place, 2147483647), 0)
    lost = tl.minimum(tl.maximum(dropped - before, 0), counts)
    score = of_key(low, SHIFT)
    if HEATED:
        score = divided(score, tl.load(heat + row))
    own = tl.load(largest + row * parts + part, mask=part < parts, other=0.0)
    each = tl.where(counts > lost, weight_of(score, own), 0.0).to(tl.float64)
    sum = tl.load(sums + row * parts + part, mask=part < parts, other=0.0)
    tl.store(sums + row * parts + part, sum + (counts - lost) * each, mask=part < parts)
    tl.store(found + 2 * row, low)
    tl.store(found + 2 * row + 1, first)


def launch_threshold(source: tuple, flags: dict, largest: Tensor, sums: Tensor, numbers: Tensor,
                     kind: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`[M, 2]` int32, for each row the lowest key that stays and the place of the first token with it that does; then
    `Warped.stats` of what stays. numbers: see `launch_lowest`."""
    lowest = launch_lowest(source, flags, largest, sums, numbers, kind)
    logits, (rows, parts) = source[0], largest.shape
    kept, weights, found = torch.empty_like(largest), torch.empty_like(sums), torch.empty_like(lowest)
    ties = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    grid, span = grid_of(rows, parts)
    shape = dict(**flags, **block_of(logits.shape[1]), **overlapping(logits.device))
    given = *source, lowest, kept, weights, ties
    _ties_kernel[grid](*given, logits.shape[1], logits.stride(0), parts, SPAN=span, **shape)
    _place_kernel[(rows,)](
        *given, found, logits.shape[1], logits.stride(0), parts, PARTS=triton.next_power_of_2(parts), **shape
    )
    return found, kept, weights
