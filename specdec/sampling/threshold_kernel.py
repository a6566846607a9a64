"""Where top-k, top-p and typical decoding cut, by Triton kernels that do not sort: `specdec.sampling.warped`.

All keep an upper part of the tokens, ordered by a key and then by index, so all that is wanted is the lowest token that
stays. Keys are those of logits or, for typical decoding, of minus the distance from the expected score. They are
bracketed: each launch sums what lies up to PIVOTS keys between the bounds that the one before has left, some at even
distances in value, which serves most rows, some at even distances in rank, which bounds the number of launches. Once
few enough keys are left, the tokens with each are counted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.scores_kernel import (
    block_of,
    divided,
    grid_of,
    load_scores,
    of_key,
    order_key,
    row_sums,
    weight_of,
)

PIVOTS = 8
BY_VALUE = tl.constexpr(2)  # of them, after the first launch
BINS = 2048  # keys whose tokens are counted
MASS, COUNT, TYPICAL = 0, 1, 2  # what may go: a share of the weight, all but a number of tokens, a share but from afar


@triton.jit
def _limit(largest, sums, numbers, row, size, parts, KIND: tl.constexpr, PARTS: tl.constexpr):
    """A row's largest score, and how much may go: weight or a number of tokens."""
    top, of_part, factors, mass = row_sums(largest, sums, row, parts, PARTS)
    if KIND == 1:
        limit = size - tl.minimum(tl.load(numbers + row), size * 1.0)
    else:
        limit = tl.load(numbers + row) * tl.sum(mass, 0)
    return top, limit


@triton.jit
def _pivot(low, high, start, end, i, FIRST: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr):
    """The key of pivot number i, a scalar or a block; its weight is that of all keys up to it."""
    if FIRST:
        return order_key(start + (end - start) * (i.to(tl.float32) / PIVOTS), SHIFT)
    by_key = low + ((high.to(tl.int64) - low) * (i + 1 - BY_VALUE) // (PIVOTS + 1 - BY_VALUE)).to(tl.int32)
    bottom = of_key(low, SHIFT)
    value = bottom + (of_key(high, SHIFT) - bottom) * ((i + 1).to(tl.float32) / (BY_VALUE + 1))
    return tl.where(i < BY_VALUE, order_key(value, SHIFT), by_key)


@triton.jit
def _bounds(
    heat, centres, state, unders, partial, row, parts, top, limit, size,
    PASS: tl.constexpr, KIND: tl.constexpr, KEY_SHIFT: tl.constexpr, HEATED: tl.constexpr, PIVOTS: tl.constexpr,
    ENOUGH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The bounds (the key sought lies above the lower one, up to the upper one), the weight up to the lower one, and
    the values between which the first pivots lie."""
    low, high = tl.full((), -2147483648, tl.int32) >> KEY_SHIFT, tl.full((), 2147483647, tl.int32) >> KEY_SHIFT
    under, start, end = tl.zeros((), tl.float64), top * 0.0, top * 0.0
    if PASS <= 1:
        spread = 16.0  # scores further below the largest weigh too little to stay
        if KIND != 1:
            spread = tl.minimum(tl.maximum(tl.log(size / tl.maximum(limit, 1e-30)).to(tl.float32), 1.0), 80.0)
        if KIND == 2:
            centre = tl.load(centres + row)
            start = -tl.maximum(tl.abs(top - spread - centre), tl.abs(top - centre))
        else:
            start, end = top - spread, top
            if HEATED:
                start, end = start * tl.load(heat + row), end * tl.load(heat + row)
        if PASS == 0:  # no key is higher than this
            high = order_key(end + tl.abs(end) * 1e-6, KEY_SHIFT)
    if PASS > 0:
        low, high, under = tl.load(state + 2 * row), tl.load(state + 2 * row + 1), tl.load(unders + row)
        if high.to(tl.int64) - low > ENOUGH:
            i, part = tl.arange(0, PIVOTS), tl.arange(0, PARTS)
            places = partial + (row * parts + part)[:, None] * PIVOTS + i[None, :]
            up_to = tl.sum(tl.load(places, mask=(part < parts)[:, None], other=0.0), 0) + under
            pivots = _pivot(low, high, start, end, i, PASS == 1, KEY_SHIFT, PIVOTS)
            inside = (pivots > low) & (pivots < high)
            fits, over = inside & (up_to <= limit), inside & (up_to > limit)
            under = tl.maximum(under, tl.max(tl.where(fits, up_to, 0.0), 0))
            low, high = tl.max(tl.where(fits, pivots, low), 0), tl.min(tl.where(over, pivots, high), 0)
    return low, high, under, start, end


@triton.jit
def _take_over(
    heat, largest, sums, numbers, centres, state, unders, partial, next_state, next_unders, row, group, size, parts,
    PASS: tl.constexpr, KIND: tl.constexpr, KEY_SHIFT: tl.constexpr, HEATED: tl.constexpr, PIVOTS: tl.constexpr,
    ENOUGH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Take over the sums of the pass before -> a row's largest score, and see `_bounds`; one of its programs stores
    them for the next pass."""
    top, limit = _limit(largest, sums, numbers, row, size, parts, KIND, PARTS)
    low, high, under, start, end = _bounds(
        heat, centres, state, unders, partial, row, parts, top, limit, size,
        PASS, KIND, KEY_SHIFT, HEATED, PIVOTS, ENOUGH, PARTS,
    )  # fmt: skip
    if group == 0:
        tl.store(next_state + 2 * row, low)
        tl.store(next_state + 2 * row + 1, high)
        tl.store(next_unders + row, under)
    return top, low, high, start, end


@triton.jit
def load_keys(
    logits, heat, cuts, bands, centre, row, place, size, row_stride, top,
    KIND: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """The keys of some tokens, and what each counts: its weight, or one."""
    score = load_scores(logits, heat, cuts, bands, row, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
    if KIND == 2:
        key = order_key(-tl.abs(score - centre), 0)
    else:
        value = tl.load(logits + row * row_stride + place, mask=place < size, other=float("-inf")).to(tl.float32)
        key = order_key(value, SHIFT)
    counts = tl.where(place < size, 1.0, 0.0) if KIND == 1 else weight_of(score, top)
    return key, counts, score


@triton.jit
def _narrow_kernel(
    logits, heat, cuts, bands, largest, sums, numbers, centres, state, unders, partial, next_state, next_unders,
    next_partial, size, row_stride, parts, PASS: tl.constexpr, KIND: tl.constexpr, PIVOTS: tl.constexpr,
    ENOUGH: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr, KEY_SHIFT: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One pass: take over the sums of the pass before, and sum some blocks of one row up to each new pivot. There is
    nothing to do once the bounds are ENOUGH keys apart."""
    await_input(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top, low, high, a, b = _take_over(
        heat, largest, sums, numbers, centres, state, unders, partial, next_state, next_unders, row, group, size,
        parts, PASS, KIND, KEY_SHIFT, HEATED, PIVOTS, ENOUGH, PARTS,
    )  # fmt: skip
    wide = high.to(tl.int64) - low > ENOUGH
    centre = tl.load(centres + row) if KIND == 2 else 0.0
    for part in range(group * SPAN, tl.minimum(group * SPAN + SPAN, parts)):
        into = next_partial + (row * parts + part) * PIVOTS
        open = wide
        if wide:
            place = part * BLOCK + tl.arange(0, BLOCK)
            key, counts, _ = load_keys(
                logits, heat, cuts, bands, centre, row, place, size, row_stride, top, KIND, SHIFT, HEATED, CUT, BANDED
            )
            counts = tl.where((key > low) & (key < high), counts, 0.0)
            open = tl.max(counts, 0) > 0
            if open:
                for i in tl.static_range(PIVOTS):
                    pivot = _pivot(low, high, a, b, tl.full((), i, tl.int32), PASS == 0, KEY_SHIFT, PIVOTS)
                    tl.store(into + i, tl.sum(tl.where(key <= pivot, counts, 0.0), 0).to(tl.float64))
        if open == 0:
            tl.store(into + tl.arange(0, PIVOTS), tl.zeros((PIVOTS,), tl.float64))


@triton.jit
def _count_kernel(
    logits, heat, cuts, bands, largest, sums, numbers, centres, state, unders, partial, next_state, next_unders, bins,
    size, row_stride, parts, PASS: tl.constexpr, KIND: tl.constexpr, PIVOTS: tl.constexpr, BINS: tl.constexpr,
    ENOUGH: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr, KEY_SHIFT: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """After the last pass: add the tokens of some blocks of one row to the counts of the keys between the bounds."""
    await_input(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top, low, high, _, _ = _take_over(
        heat, largest, sums, numbers, centres, state, unders, partial, next_state, next_unders, row, group, size,
        parts, PASS, KIND, KEY_SHIFT, HEATED, PIVOTS, ENOUGH, PARTS,
    )  # fmt: skip
    if KIND != 2:
        for part in range(group * SPAN, tl.minimum(group * SPAN + SPAN, parts)):
            place = part * BLOCK + tl.arange(0, BLOCK)
            key, counts, score = load_keys(
                logits, heat, cuts, bands, 0.0, row, place, size, row_stride, top, KIND, SHIFT, HEATED, CUT, BANDED
            )
            bin = key.to(tl.int64) - low - 1
            inside = (key > low) & (key <= high) & (bin < BINS) & (place < size)
            if KIND == 0 and (CUT or BANDED):
                inside = inside & (score > float("-inf"))
            tl.atomic_add(bins + row * BINS + bin, 1, mask=inside, sem="relaxed")


@triton.jit
def _lowest_kernel(
    logits, heat, cuts, bands, largest, sums, numbers, state, unders, bins, lowest, size, parts, KIND: tl.constexpr,
    BINS: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row's lowest key that stays, and how many tokens with it go, the first ones; one at least stays."""
    await_input(OVERLAP)
    row, bin = tl.program_id(0).to(tl.int64), tl.arange(0, BINS)
    low, high, dropped = tl.load(state + 2 * row), tl.load(state + 2 * row + 1), tl.zeros((), tl.int32)
    key = high
    if KIND != 2:
        top, limit = _limit(largest, sums, numbers, row, size, parts, KIND, PARTS)
        counts = tl.load(bins + row * BINS + bin)
        each = tl.full((BINS,), 1.0, tl.float64)
        if KIND == 0:
            value = of_key(low + 1 + bin, SHIFT)
            if HEATED:
                value = divided(value, tl.load(heat + row))
            each = weight_of(value, top).to(tl.float64)
        mass = tl.where(counts > 0, counts * each, 0.0)
        up_to = tl.cumsum(mass, 0) + tl.load(unders + row)
        found = tl.min(tl.where((up_to > limit) & (counts > 0), bin, BINS), 0)
        last = tl.max(tl.where(counts > 0, bin, 0), 0)  # rounding may leave none above the limit
        found = tl.where(found < BINS, found, last)
        count = tl.sum(tl.where(bin == found, counts, 0), 0)
        key = tl.where(count > 0, low + 1 + found, high)
        if KIND == 0:
            one = tl.sum(tl.where(bin == found, each, 0.0), 0)
            room = limit - tl.sum(tl.where(bin == found, up_to - mass, 0.0), 0)
            dropped = tl.minimum(tl.maximum(room / one, 0.0), count * 1.0).to(tl.int32)
            # a product decides, not a quotient
            dropped = tl.where((dropped + 1) * one <= room, dropped + 1, dropped)
            dropped = tl.where(dropped * one > room, dropped - 1, dropped)
            dropped = tl.maximum(tl.minimum(dropped, count - 1), 0)
    tl.store(lowest + 2 * row, key)
    tl.store(lowest + 2 * row + 1, dropped)


def launch_lowest(source: tuple, flags: dict, largest: Tensor, sums: Tensor, numbers: Tensor, kind: int,
                  centres: Tensor | None = None) -> Tensor:  # fmt: skip
    """`[M, 2]` int32: for each row the lowest key that stays, and how many of the tokens with it go.

    source, flags, largest, sums: see `Warped`.
    numbers [M] float64: the share of the weight that may go, or for COUNT the number of tokens that stay.
    centres [M]: for TYPICAL, the score from which the distance is taken.
    """
    logits = source[0]
    (rows, size), parts, shift = logits.shape, largest.shape[1], 0 if kind == TYPICAL else flags["SHIFT"]
    make = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=logits.device)
    state, unders = make(2, rows, 2, dtype=torch.int32), make(2, rows, dtype=torch.float64)
    partial, found = make(2, rows, parts, PIVOTS, dtype=torch.float64), make(rows, 2, dtype=torch.int32)
    bins = torch.zeros(rows, BINS if kind != TYPICAL else 1, dtype=torch.int32, device=logits.device)
    numbers, centres = numbers.contiguous(), largest if centres is None else centres
    grid, span = grid_of(rows, parts)
    shape = dict(
        KIND=kind, PARTS=triton.next_power_of_2(parts), **flags, **block_of(size), **overlapping(logits.device)
    )
    enough, keys, passes = 1 if kind == TYPICAL else BINS, 1 << 32 - shift, 1
    many = dict(shape, PIVOTS=PIVOTS, SPAN=span, KEY_SHIFT=shift, ENOUGH=enough)
    # a pass leaves a part of the keys, where there are more than can be counted
    while keys > enough:
        keys, passes = -(-keys // (PIVOTS + 1 - BY_VALUE.value)), passes + 1
    of_row = *source, largest, sums, numbers, centres
    for index in range(passes + 1):
        old, new = (index + 1) % 2, index % 2
        given = *of_row, state[old], unders[old], partial[old], state[new], unders[new]
        if index < passes:
            _narrow_kernel[grid](*given, partial[new], size, logits.stride(0), parts, PASS=min(index, 2), **many)
        else:
            _count_kernel[grid if kind != TYPICAL else (rows, 1)](
                *given, bins, size, logits.stride(0), parts, PASS=2, BINS=BINS, **many
            )
    _lowest_kernel[(rows,)](
        *source, largest, sums, numbers, state[new], unders[new], bins, found, size, parts, BINS=bins.shape[1], **shape
    )
    return found


def launch_distance(source: tuple, flags: dict, largest: Tensor, sums: Tensor, numbers: Tensor,
                    centres: Tensor) -> Tensor:  # fmt: skip
    """`[M]`: the largest distance from `centres [M]` of a token that stays, where a share `numbers [M]` of the weight
    may go. Other arguments: see `Warped`."""
    keys = launch_lowest(source, flags, largest, sums, numbers, TYPICAL, centres)[:, 0]
    return -torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32)
