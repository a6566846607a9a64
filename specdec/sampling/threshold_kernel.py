"""Where top-k, top-p and typical decoding cut, by Triton kernels that do not sort: `specdec.sampling.warped`.

All keep an upper part of the tokens, ordered by a key and then by index, so all that is wanted is the lowest token that
stays: keys are those of logits or, for typical decoding, of minus the distance from the expected score. They are
bracketed: each launch tries PIVOTS keys between the bounds that the one before has left. The first pivots are at even
distances between the largest score and one below which little weight can lie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.scores_kernel import block_of, grid_of, load_scores, order_key, row_sums, weight_of

PIVOTS = 16
MASS, COUNT, TYPICAL = 0, 1, 2  # what may go: a share of the weight, all but a number of tokens, a share but from afar


@triton.jit
def _row_state(
    heat, largest, sums, numbers, centres, state, unders, partial, row, size, parts,
    PASS: tl.constexpr, KIND: tl.constexpr, KEY_SHIFT: tl.constexpr, HEATED: tl.constexpr, PIVOTS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """A row's largest score, what may go, the bounds of the key, what lies up to the lower one, and where pivots start
    and end if there are to be values."""
    top, of_part, factors, mass = row_sums(largest, sums, row, parts, PARTS)
    number = tl.load(numbers + row)
    if KIND == 1:
        limit = size - tl.minimum(number, size * 1.0)
        spread = 16.0
    else:
        total = tl.sum(mass, 0)
        limit = number * total
        spread = tl.minimum(tl.maximum(tl.log(size / tl.maximum(limit, 1e-30)).to(tl.float32), 1.0), 80.0)
    warmth = 1.0
    if HEATED:
        warmth = tl.load(heat + row)
    if KIND == 2:
        start = -tl.maximum(tl.abs(top - spread - tl.load(centres + row)), tl.abs(top - tl.load(centres + row)))
        end = 0.0
    else:
        start, end = (top - spread) * warmth, top * warmth
    low, high = tl.full((), -2147483648, tl.int64), tl.full((), 2147483647, tl.int64)
    low, high = (low >> KEY_SHIFT) - 1, high >> KEY_SHIFT
    under = tl.zeros((), tl.float64)
    if PASS > 0:
        low, high, under = tl.load(state + 2 * row), tl.load(state + 2 * row + 1), tl.load(unders + row)
        if high - low > 1:
            rank, part = tl.arange(0, PIVOTS), tl.arange(0, PARTS)
            places = partial + (row * parts + part)[:, None] * PIVOTS + rank[None, :]
            up_to = tl.sum(tl.load(places, mask=(part < parts)[:, None], other=0.0), 0) + under
            pivots = _pivots(low, high, start, end, rank, PASS - 1, KEY_SHIFT, PIVOTS)
            fits = (up_to <= limit) & (pivots > low) & (pivots < high)
            over = (up_to > limit) & (pivots > low)
            under = tl.maximum(under, tl.max(tl.where(fits, up_to, 0.0), 0))
            high = tl.minimum(high, tl.min(tl.where(over, pivots, high), 0))
            low = tl.max(tl.where(fits, pivots, low), 0)
    return top, limit, low, high, under, start, end


@triton.jit
def _pivots(low, high, start, end, rank, PASS: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr):
    """The key of pivot number `rank`."""
    if PASS == 0:
        return order_key(start + (end - start) * (rank.to(tl.float32) / PIVOTS), SHIFT).to(tl.int64)
    return low + (high - low) * (rank + 1) // (PIVOTS + 1)


@triton.jit
def _keys(
    logits, heat, cuts, bands, centre, row, place, size, row_stride, top,
    KIND: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """The keys of a block's tokens, and what each counts: its weight, or one."""
    score = load_scores(logits, heat, cuts, bands, row, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
    if KIND == 2:
        key = order_key(-tl.abs(score - centre), 0)
    else:
        value = tl.load(logits + row * row_stride + place, mask=place < size, other=float("-inf")).to(tl.float32)
        key = order_key(value, SHIFT)
    counts = tl.where(place < size, 1.0, 0.0) if KIND == 1 else weight_of(score, top)
    return key, counts


@triton.jit
def _narrow_kernel(
    logits, heat, cuts, bands, largest, sums, numbers, centres, state, unders, partial, next_state, next_unders,
    next_partial, size, row_stride, parts, PASS: tl.constexpr, KIND: tl.constexpr, PIVOTS: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr,
    KEY_SHIFT: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One pass: take over the sums of the pass before, and sum some blocks of one row up to each new pivot."""
    await_input(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top, limit, low, high, under, start, end = _row_state(
        heat, largest, sums, numbers, centres, state, unders, partial, row, size, parts,
        PASS, KIND, KEY_SHIFT, HEATED, PIVOTS, PARTS,
    )  # fmt: skip
    if group == 0:
        tl.store(next_state + 2 * row, low)
        tl.store(next_state + 2 * row + 1, high)
        tl.store(next_unders + row, under)
    if high - low > 1:
        centre = tl.load(centres + row) if KIND == 2 else 0.0
        for part in range(group * SPAN, tl.minimum(group * SPAN + SPAN, parts)):
            place = part * BLOCK + tl.arange(0, BLOCK)
            key, counts = _keys(
                logits, heat, cuts, bands, centre, row, place, size, row_stride, top, KIND, SHIFT, HEATED, CUT, BANDED
            )
            inside = (key > low) & (key < high)
            counts = tl.where(inside, counts, 0.0)
            into = next_partial + (row * parts + part) * PIVOTS
            if tl.max(counts, 0) > 0:
                for step in tl.static_range(PIVOTS):
                    pivot = _pivots(low, high, start, end, tl.full((), step, tl.int32), PASS, KEY_SHIFT, PIVOTS)
                    up_to = tl.sum(tl.where(key <= pivot, counts, 0.0), 0)
                    tl.store(into + step, up_to.to(tl.float64))
            else:
                tl.store(into + tl.arange(0, PIVOTS), tl.zeros((PIVOTS,), tl.float64))


@triton.jit
def _ties_kernel(
    logits, heat, cuts, bands, largest, sums, numbers, centres, state, unders, partial, gone, ties, size, row_stride,
    parts, PASS: tl.constexpr, KIND: tl.constexpr, PIVOTS: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    KEY_SHIFT: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """After the last pass: the key of the lowest token that stays, what may go of its weight, and how many tokens of
    each block have it."""
    await_input(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top, limit, low, high, under, start, end = _row_state(
        heat, largest, sums, numbers, centres, state, unders, partial, row, size, parts,
        PASS, KIND, KEY_SHIFT, HEATED, PIVOTS, PARTS,
    )  # fmt: skip
    if group == 0:
        tl.store(gone + 2 * row, high.to(tl.float64))
        tl.store(gone + 2 * row + 1, limit - under)
    if KIND == 0:
        for part in range(group * SPAN, tl.minimum(group * SPAN + SPAN, parts)):
            place = part * BLOCK + tl.arange(0, BLOCK)
            key, counts = _keys(
                logits, heat, cuts, bands, 0.0, row, place, size, row_stride, top, KIND, SHIFT, HEATED, CUT, BANDED
            )
            tl.store(ties + row * parts + part, tl.sum(((key == high) & (counts > 0)).to(tl.int32), 0))


@triton.jit
def _cut_kernel(
    logits, heat, cuts, bands, largest, sums, gone, ties, found, size, row_stride, parts,
    KIND: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row's (lowest key that stays, place of the first token with it that does). The last such token stays."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    lowest, first = tl.load(gone + 2 * row).to(tl.int32), tl.zeros((), tl.int32)
    if KIND == 0:
        counts = tl.load(ties + row * parts + part, mask=part < parts, other=0)
        total = tl.sum(counts, 0)
        if total > 1:
            top, of_part, factors, mass = row_sums(largest, sums, row, parts, PARTS)
            before = tl.cumsum(counts, 0) - counts
            some = tl.max(tl.where(counts > 0, part, 0), 0)  # a block that holds one
            place = some * BLOCK + tl.arange(0, BLOCK)
            key, weight = _keys(
                logits, heat, cuts, bands, 0.0, row, place, size, row_stride, top, KIND, SHIFT, HEATED, CUT, BANDED
            )
            one = tl.max(tl.where(key == lowest, weight, 0.0), 0).to(tl.float64)
            # how many of them go; exact multiples as a product decides, not a quotient
            dropped = tl.minimum(tl.load(gone + 2 * row + 1) / one, total * 1.0).to(tl.int32)
            dropped = tl.where((dropped + 1) * one <= tl.load(gone + 2 * row + 1), dropped + 1, dropped)
            dropped = tl.where(dropped * one > tl.load(gone + 2 * row + 1), dropped - 1, dropped)
            dropped = tl.minimum(dropped, total - 1)
            chosen = tl.max(tl.where((before <= dropped) & (counts > 0), part, 0), 0)
            place = chosen * BLOCK + tl.arange(0, BLOCK)
            key, weight = _keys(
                logits, heat, cuts, bands, 0.0, row, place, size, row_stride, top, KIND, SHIFT, HEATED, CUT, BANDED
            )
            equal = (key == lowest) & (weight > 0)
            order = tl.cumsum(equal.to(tl.int32), 0) + tl.sum(tl.where(part == chosen, before, 0), 0)  # from 1 on
            first = tl.min(tl.where(equal & (order > dropped), place, 2147483647), 0)
    tl.store(found + 2 * row, lowest)
    tl.store(found + 2 * row + 1, first)


def launch_threshold(source: tuple, flags: dict, largest: Tensor, sums: Tensor, numbers: Tensor, kind: int,
                     centres: Tensor | None = None) -> Tensor:  # fmt: skip
    """`[M, 2]` int32: for each row the lowest key that stays and the place of the first token with it that does.

    source, flags: see `Warped`.
    numbers [M] float64: the share of the weight that may go, or for COUNT the number of tokens that stay.
    centres [M]: for TYPICAL, the expected score, from which the distance is taken.
    """
    logits = source[0]
    (rows, size), parts, shift = logits.shape, largest.shape[1], 0 if kind == TYPICAL else flags["SHIFT"]
    make = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=logits.device)
    state, unders = make(2, rows, 2, dtype=torch.int64), make(2, rows, dtype=torch.float64)
    partial, gone = make(2, rows, parts, PIVOTS, dtype=torch.float64), make(rows, 2, dtype=torch.float64)
    ties, found = make(rows, parts, dtype=torch.int32), make(rows, 2, dtype=torch.int32)
    of_row = *source, largest, sums, numbers.contiguous(), largest if centres is None else centres
    grid, span = grid_of(rows, parts)
    shape = dict(
        KIND=kind, PARTS=triton.next_power_of_2(parts), **flags, **block_of(size), **overlapping(logits.device)
    )
    many = dict(shape, PIVOTS=PIVOTS, SPAN=span, KEY_SHIFT=shift)
    passes = 1
    while (PIVOTS + 1) ** (passes - 1) < 2 ** (32 - shift):
        passes += 1
    for index in range(passes):
        old, new = (index + 1) % 2, index % 2
        _narrow_kernel[grid](
            *of_row, state[old], unders[old], partial[old], state[new], unders[new], partial[new], size,
            logits.stride(0), parts, PASS=min(index, 2), **many,
        )  # fmt: skip
    last = (passes - 1) % 2
    _ties_kernel[grid if kind == MASS else (rows, 1)](
        *of_row, state[last], unders[last], partial[last], gone, ties, size, logits.stride(0), parts, PASS=2, **many
    )
    _cut_kernel[(rows,)](*source, largest, sums, gone, ties, found, size, logits.stride(0), parts, **shape)
    return found
