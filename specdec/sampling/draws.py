"""Draws from distributions, and the largest of many scores."""

from operator import gt

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.recording import as_one
from specdec.sampling.warped import Scores, Warped, as_unwritten


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index per row of `weights [..., V]` by inverting the cumulative sum at `uniform [...]`.

    Weights are float32 or float64, non-negative, with a positive sum. A weight of zero is never drawn: `uniform` lies
    in [0, 1), and the first index whose cumulative sum exceeds it has a weight above zero."""
    cumulative = weights.double().cumsum(-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    # the clamp matters for NaN weights only, which the caller reports; it keeps the index inside the vocabulary
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)


def sample(scores: Scores, uniform: Tensor, impl: str | None = None) -> Tensor:
    """`draw(scores.softmax(-1), uniform)`: of `scores [..., V]` and `uniform [...]`, `[...]`; see `sample_distinct`."""
    return sample_distinct(scores, uniform[..., None], impl)[0][..., 0]


def sample_distinct(
    scores: Scores, uniform: Tensor, impl: str | None = None, probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """K draws without replacement from the softmax of `scores [..., V]`, with `uniform [..., K]`, in float32 at least.

    Returns tokens `[..., K]` and whether any weight was left for each; the softmax is written to `probs [B, n, V]`, if
    that is given. The kernel reads the scores once, and a block of each row again for each draw. It sums in float64
    too; it gives another token only where a number lies within a few float32 roundings of a boundary between two."""

    few = isinstance(scores, Warped) or uniform.shape[-1] <= MAX_TOP  # a program takes longer to compile for more
    if (warped := as_unwritten(scores, impl if few else "reference")) is not None:
        from specdec.sampling.draw_kernel import launch_find, launch_probs

        found = launch_find(warped.source, warped.flags, *warped.stats, uniform.flatten(0, -2))
        if probs is not None:
            launch_probs(warped.source, warped.flags, *warped.stats, probs)
        return found[0].view(uniform.shape), found[1].view(uniform.shape)
    assert isinstance(scores, Tensor)
    of_all = rest = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    drawn, left = [], []
    for rank, number in enumerate(uniform.unbind(-1)):
        left.append(rest.sum(-1) > 0)
        drawn.append(draw(rest, number))
        if rank + 1 < uniform.shape[-1]:
            rest = rest.scatter(-1, drawn[-1][..., None], 0.0)
    if probs is not None:
        probs.copy_(of_all)
    return torch.stack(drawn, -1), torch.stack(left, -1)


def totals_of(weights: Tensor, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The sum, in float64, and the smallest of each row of `weights [..., V]`, 0 at most; NaN makes the sum NaN."""
    reason = lambda: None if weights.dtype == torch.float32 else f"it takes float32 weights, got {weights.dtype}"
    if resolve(impl, weights.device, reason) == "reference":
        return weights.sum(-1, dtype=torch.float64), weights.amin(-1).clamp(max=0)
    from specdec.sampling.draw_kernel import launch_totals

    totals, least = launch_totals(weights)
    return totals, least.clamp(max=0)


MAX_TOP = 16  # largest scores that the kernel finds in a row


def best(scores: Tensor, impl: str | None = None) -> Tensor:
    """`scores.argmax(-1)`: the first of equal scores; NaN counts as the largest.

    The kernel splits rows among programs, since torch's argmax leaves most of a GPU idle where rows are few and long.
    """
    found = _by_kernel(scores, 1, impl)
    return scores.argmax(-1) if found is None else found[1][..., 0]


def highest(scores: Tensor, impl: str | None = None) -> Tensor:
    """`scores.amax(-1)`, by the same kernel."""
    found = _by_kernel(scores, 1, impl)
    return scores.amax(-1) if found is None else found[0][..., 0]


def peak(scores: Tensor, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """`scores.max(-1)`: `highest` and `best` in one pass."""
    found = _by_kernel(scores, 1, impl)
    return scores.max(-1) if found is None else (found[0][..., 0], found[1][..., 0])


def top(scores: Tensor, count: int, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The `count` largest of `scores [..., V]`: values and indices `[..., count]`.

    Unlike `topk`, equal scores come in the order of their indices; NaN counts as the largest."""
    found = _by_kernel(scores, count, impl)
    if found is not None:
        return found
    if scores.device.type != "cpu":
        return _top_by_keys(scores, count)
    values, places = as_one(lambda scores: _top_on_host(scores, count), scores)
    return values, places


def top_log_probs(scores: Scores, count: int, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens for `scores [..., V]`: logarithms of their probabilities, and they, `[..., count]`.

    Like `top` of `log_softmax(-1)`, which is not written out: at most 0, -inf where the score is, NaN for rows with NaN
    or infinity. In float32 at least; the kernel reads the scores once."""
    if (warped := as_unwritten(scores, impl if count <= MAX_TOP else "reference")) is not None:
        from specdec.sampling.log_probs_kernel import launch_top_log_probs

        return launch_top_log_probs(warped.source, warped.flags, warped.shape, count)
    assert isinstance(scores, Tensor)
    values, places = top(scores, count, impl)
    precise = torch.promote_types(scores.dtype, torch.float32)
    values, totals = values.to(precise), scores.to(precise).logsumexp(-1)
    totals = totals.masked_fill(totals == float("inf"), float("nan"))
    return torch.where(values == float("-inf"), values, (values - totals[..., None]).clamp(max=0)), places


def _top_on_host(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`top` by `topk`, which takes any of equal scores; rows with equal scores are then sorted again."""
    values, places = scores.topk(min(count + 1, scores.shape[-1]))
    found = values.tolist() if values.ndim == 2 else values.reshape(-1, values.shape[-1]).tolist()
    again = [i for i, row in enumerate(found) if not all(map(gt, row, row[1:]))]  # NaN is not greater than anything
    values, places = values.narrow(-1, 0, count), places.narrow(-1, 0, count)
    if again:
        shape, rows = values.shape, scores.detach().reshape(-1, scores.shape[-1])
        values, places = values.reshape(-1, count), places.reshape(-1, count)
        for i in again:
            last = found[i][count - 1]
            if len(found[i]) > count and not last > found[i][count]:  # all that are not smaller compete, NaN included
                row = rows[i] if rows.dtype in (torch.float32, torch.float64) else rows[i].float()
                few = torch.from_numpy((~(row.numpy() < last)).nonzero()[0])
            else:
                few = places[i].sort().values
            places[i] = few[rows[i, few].sort(descending=True, stable=True).indices[:count]]
            values[i] = rows[i, places[i]]
        values, places = values.view(shape), places.view(shape)
    return values, places


def _top_by_keys(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`top` by `topk` of distinct integers: the score's float32 bits, made to sort like its value, then its index."""
    if scores.dtype == torch.float64:
        ordered = scores.sort(descending=True, stable=True)
        return ordered.values[..., :count], ordered.indices[..., :count]
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 is 0.0
    bits = torch.where(scores.isnan(), 0x7FFFFFFF, bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    places = (bits << 32 | torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)).topk(count).indices
    return scores.gather(-1, places), places


def _by_kernel(scores: Tensor, count: int, impl: str | None) -> tuple[Tensor, Tensor] | None:
    """`top` by the Triton kernel; None where PyTorch is to run."""

    def fallback_reason() -> str | None:
        if scores.dtype == torch.float64:
            return "it compares in float32"
        return f"it finds up to {MAX_TOP}, got {count}" if count > MAX_TOP else None

    if resolve(impl, scores.device, fallback_reason) == "reference":
        return None
    from specdec.sampling.top_kernel import launch_top

    return launch_top(scores, count)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)) `[..., V]`, or p where the two are equal (nothing to reject)."""
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)
