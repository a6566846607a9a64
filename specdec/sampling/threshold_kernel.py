"""Top-k and top-p by Triton kernels that do not sort: `warpers.keep_upper`.

Both keep an upper part of the tokens, ordered by score and then by index. One program searches a row for the lowest
token that stays: integers that sort like the scores are bracketed, and every pass over the row tries PIVOTS of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping

BLOCK, PIVOTS = 1024, 16


@triton.jit
def _key(score):
    """An int64 that sorts like the float32 score; NaN sorts highest, and -0 like 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 2147483647, ordered).to(tl.int64)


@triton.jit
def _weight(score, top, MASS: tl.constexpr):
    """With MASS exp(score - top); else 1."""
    if MASS:
        weight = tl.where(score == float("-inf"), 0.0, tl.exp(score - top))
    else:
        weight = tl.full(score.shape, 1.0, tl.float32)
    return weight


@triton.jit
def _threshold_kernel(
    scores, numbers, values, cuts, size, row_stride,
    MASS: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The lowest token of one row that stays: its score, and its index among equal ones.

    With MASS tokens go, from the lowest on, while their share of all weight, cumulated, is at most the row's number;
    else so many of the highest stay, with all that equal the last of them."""
    await_input(OVERLAP)
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    number = tl.load(numbers + row)
    scores += row * row_stride
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        score = tl.load(scores + start + lane, mask=start + lane < size, other=float("-inf"))
        highest = tl.maximum(highest, score)
    top = tl.max(highest, 0)
    # `under`: the weight of all keys up to `low`, which go; those up to `high` weigh more than `limit`
    low, high = tl.full((), -2147483649, tl.int64), _key(top)
    limit, under = size - tl.minimum(number, size), tl.zeros((), tl.float64)
    if MASS:
        each = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, size, BLOCK):
            score = tl.load(scores + start + lane, mask=start + lane < size, other=float("-inf"))
            each += _weight(score, top, MASS).to(tl.float64)
        limit = number * tl.sum(each, 0)
        # even all tokens together, if each weighed this little, would go
        least = top + tl.log(tl.maximum(number, 1e-30) / size).to(tl.float32) - 0.01
        low = tl.where(top > float("-inf"), _key(least), low)
        for start in range(0, size, BLOCK):
            score = tl.load(scores + start + lane, mask=start + lane < size, other=float("-inf"))
            light = _weight(score, top, MASS).to(tl.float64)
            under += tl.sum(tl.where(_key(score) <= low, light, 0.0), 0)
    step = tl.arange(0, PIVOTS).to(tl.int64) + 1
    while high - low > 1:
        pivots = low + (high - low) * step // (PIVOTS + 1)
        sums = tl.zeros((PIVOTS,), tl.float64)
        for start in range(0, size, BLOCK):
            score = tl.load(scores + start + lane, mask=start + lane < size, other=float("-inf"))
            weight = tl.where(start + lane < size, _weight(score, top, MASS), 0.0)
            up_to = _key(score)[None, :] <= pivots[:, None]
            sums += tl.sum(tl.where(up_to, weight[None, :], 0.0), 1).to(tl.float64)
        fits = (sums <= limit) & (pivots > low)
        under = tl.maximum(under, tl.max(tl.where(fits, sums, 0.0), 0))
        high = tl.min(tl.where((sums <= limit) | (pivots <= low), high, pivots), 0)  # sums may be NaN
        low = tl.max(tl.where(fits, pivots, low), 0)
    # tokens with the key `high`: with MASS the first of them may go too
    value = tl.full((), float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        score = tl.load(scores + start + lane, mask=start + lane < size, other=float("-inf"))
        value = tl.maximum(value, tl.max(tl.where(_key(score) == high, score, float("-inf")), 0))
    cut = tl.zeros((), tl.int32)
    if MASS:
        one = tl.exp(value - top).to(tl.float64)
        gone = tl.floor((limit - under) / tl.where(one > 0, one, 1.0))
        seen, last = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        cut = tl.full((), 2147483647, tl.int32)
        for start in range(0, size, BLOCK):
            score = tl.load(scores + start + lane, mask=start + lane < size, other=float("-inf"))
            equal = (_key(score) == high) & (start + lane < size)
            order = tl.cumsum(equal.to(tl.int32), 0) + seen - 1
            cut = tl.minimum(cut, tl.min(tl.where(equal & (order >= gone), start + lane, 2147483647), 0))
            last = tl.maximum(last, tl.max(tl.where(equal, start + lane, 0), 0))
            seen += tl.sum(equal.to(tl.int32), 0)
        cut = tl.minimum(cut, last)  # the highest token always stays
    tl.store(values + row, value)
    tl.store(cuts + row, cut)


@triton.jit
def _mask_kernel(scores, values, cuts, kept, size, row_stride, filtered, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Scores of one block of one row, `filtered` below the row's threshold."""
    await_input(OVERLAP)
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value, cut = tl.load(values + row), tl.load(cuts + row)
    score = tl.load(scores + row * row_stride + place, mask=place < size, other=0.0)
    goes = (score < value) | ((score == value) & (place < cut))
    tl.store(kept + row * size + place, tl.where(goes, filtered, score), mask=place < size)


def launch_keep_upper(scores: Tensor, numbers: Tensor, mass: bool, filter_value: float) -> Tensor:
    """See `specdec.sampling.warpers.keep_upper`; scores `[M, V]` float32, numbers `[M]` float64."""
    (rows, size), overlap = scores.shape, overlapping(scores.device)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    values, cuts = scores.new_empty(rows), scores.new_empty(rows, dtype=torch.int32)
    kept, block = torch.empty_like(scores, memory_format=torch.contiguous_format), 4096
    small = min(BLOCK, triton.next_power_of_2(size))
    _threshold_kernel[(rows,)](
        scores, numbers.contiguous(), values, cuts, size, scores.stride(0), mass, small, PIVOTS, num_warps=8, **overlap
    )
    _mask_kernel[(rows, triton.cdiv(size, block))](
        scores, values, cuts, kept, size, scores.stride(0), filter_value, block, num_warps=8, **overlap
    )
    return kept
