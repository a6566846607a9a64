"""transformers' warpers (temperature, top-k, top-p …) as functions of the scores and of one number per row.

A request's numbers are data here, not code: rows with different temperatures share one call, and a captured round
serves every request with the same kinds of warpers. Scores are those of transformers' classes, bit for bit on a CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import logits_process as hf


@dataclass(frozen=True, slots=True)
class Warper:
    """A warper of transformers without its number.

    kind: its class.
    filter_value: the score of removed tokens.
    keep: tokens that always stay.
    widest: the largest k of top-k in the batch, rounded up to a power of two.
    """

    kind: type
    filter_value: float = float("-inf")
    keep: int = 1
    widest: int = 0


def _temperature(scores: Tensor, temperature: Tensor, warper: Warper) -> Tensor:
    return scores / temperature


def _top_k(scores: Tensor, k: Tensor, warper: Warper) -> Tensor:
    largest = scores.topk(min(warper.widest, scores.shape[-1])).values
    # a slot without a row may hold any number, of an earlier call
    smallest = largest.gather(1, (k.long() - 1).clamp(0, largest.shape[-1] - 1))
    return scores.masked_fill(scores < smallest, warper.filter_value)


def _top_p(scores: Tensor, outside: Tensor, warper: Warper) -> Tensor:
    ascending, order = scores.sort(descending=False)
    removed = ascending.softmax(-1).cumsum(-1) <= outside
    removed[..., -warper.keep :] = False
    return scores.masked_fill(removed.scatter(1, order, removed), warper.filter_value)


def _min_p(scores: Tensor, share: Tensor, warper: Warper) -> Tensor:
    probs = scores.softmax(-1)
    removed = probs < share * probs.amax(-1, keepdim=True)
    removed.scatter_(-1, probs.topk(min(warper.keep, probs.shape[-1])).indices, False)
    return scores.masked_fill(removed, warper.filter_value)


def _typical(scores: Tensor, mass: Tensor, warper: Warper) -> Tensor:
    logs = scores.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    distance, order = (-logs - entropy).abs().sort(descending=False)
    cumulative = scores.gather(-1, order).softmax(-1).cumsum(-1)
    last = (cumulative < mass).sum(1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    removed = distance > distance.gather(1, last)
    removed[..., : warper.keep] = False
    return scores.masked_fill(removed.scatter(1, order, removed), warper.filter_value)


def _epsilon(scores: Tensor, epsilon: Tensor, warper: Warper) -> Tensor:
    kept = scores.topk(min(warper.keep, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill((scores.softmax(-1) < epsilon) & (scores < kept), warper.filter_value)


def _eta(scores: Tensor, epsilon: Tensor, warper: Warper) -> Tensor:
    logs = (scores - scores.logsumexp(-1, keepdim=True)).clamp(min=torch.finfo(scores.dtype).min)
    entropy = -(logs * logs.softmax(-1)).sum(-1, keepdim=True)
    return _epsilon(scores, torch.minimum(epsilon, epsilon.sqrt() * (-entropy).exp()), warper)


def _finite(scores: Tensor, number: None, warper: Warper) -> Tensor:
    info = torch.finfo(scores.dtype)
    finite = torch.where(scores != scores, 0.0, scores)
    finite = torch.where(scores == float("inf"), info.max, finite)
    return torch.where(scores == float("-inf"), info.min, finite)


def _normalised(scores: Tensor, number: None, warper: Warper) -> Tensor:
    return scores.log_softmax(-1)


# class -> (function, the attribute that holds its number, how the function's argument follows from that)
KINDS: dict[type, tuple[Callable, str | None, Callable[[float], float]]] = {
    hf.TemperatureLogitsWarper: (_temperature, "temperature", float),
    hf.TopKLogitsWarper: (_top_k, "top_k", float),
    hf.TopPLogitsWarper: (_top_p, "top_p", lambda top_p: 1 - top_p),
    hf.MinPLogitsWarper: (_min_p, "min_p", float),
    hf.TypicalLogitsWarper: (_typical, "mass", float),
    hf.EpsilonLogitsWarper: (_epsilon, "epsilon", float),
    hf.EtaLogitsWarper: (_eta, "epsilon", float),
    hf.InfNanRemoveLogitsProcessor: (_finite, None, float),
    hf.LogitNormalization: (_normalised, None, float),
}


def has_number(kind: type) -> bool:
    """Whether warpers of this class have a number."""
    return KINDS[kind][1] is not None


def split(lists: Sequence[Sequence[Callable]]) -> tuple[tuple[Warper, ...], list[list[float]]] | None:
    """The warpers that all rows share and, for each that has one, its number in each row.

    None where some processor of `lists[row]` is of another kind, or rows have different kinds."""
    kinds = [[type(processor) for processor in row] for row in lists]
    if any(row != kinds[0] for row in kinds) or not all(kind in KINDS for kind in kinds[0]):
        return None
    warpers, numbers = [], []
    for column in zip(*lists, strict=True):
        _, name, given = KINDS[type(column[0])]
        ks = [getattr(processor, "top_k", 0) for processor in column]
        options = {(getattr(p, "filter_value", float("-inf")), getattr(p, "min_tokens_to_keep", 1)) for p in column}
        if len(options) != 1:
            return None
        warpers.append(Warper(type(column[0]), *options.pop(), 1 << (max(ks) - 1).bit_length() if max(ks) else 0))
        if name is not None:
            numbers.append([given(getattr(processor, name)) for processor in column])
    return tuple(warpers), numbers


SCALING = (hf.TemperatureLogitsWarper,)
CUTTING = (hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper, hf.EpsilonLogitsWarper,
           hf.EtaLogitsWarper)  # leave the largest  # fmt: skip


def largest_after(warpers: Sequence[Warper], numbers: Tensor, largest: Tensor) -> Tensor | None:
    """The largest score `[M]` that `warpers` leave of scores whose largest is `largest [M]`; None: it depends on more.

    numbers: see `warp`."""
    rest = iter(numbers.to(largest.dtype).unbind(0))
    for warper in warpers:
        if warper.kind not in (*SCALING, *CUTTING):
            return None
        number = next(rest)
        largest = largest / number if warper.kind in SCALING else largest
    return largest


def warp(warpers: Sequence[Warper], numbers: Tensor, scores: Tensor) -> Tensor:
    """Apply `warpers` to `scores [M, V]`; `numbers [P, M]` float64 are those of the P warpers that have one.

    >>> warper, rows = Warper(hf.TemperatureLogitsWarper), torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    >>> warp([warper], rows, torch.ones(2, 3)).tolist()
    [[2.0, 2.0, 2.0], [0.5, 0.5, 0.5]]
    """
    rest = iter(numbers.to(scores.dtype).unbind(0))
    for warper in warpers:
        number = next(rest)[:, None] if has_number(warper.kind) else None
        scores = KINDS[warper.kind][0](scores, number, warper)
    return scores
