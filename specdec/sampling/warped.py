"""Scores that are not written out: the logits of some positions and what temperature, top-k, top-p … make of them.

On a GPU the scores of a round would be twice to four times as large as its logits and be written and read several
times. `Warped` keeps, for each position, the temperature and where the warpers cut; kernels make scores of logits as
they read them. Equal to `warpers.warp`, but for tokens whose weight lies within float32 roundings of a boundary.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from attention.dispatch import resolve
from specdec.sampling.warpers import Warper, has_number

SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # last bits that are 0 in a number's float32


class Warped:
    """Scores of `logits [..., V]` (float32, float16 or bfloat16), of which `heat` and `cuts` are over M = the product
    of the first sizes.

    heat [M] float32: the temperature (None: 1).
    cuts [M, 2] int32: (lowest key, see `scores_kernel.order_key`, that stays; first place that does among its equals).
    bands [M, 2] float32: the lowest and the highest score that stay.
    """

    def __init__(self, logits: Tensor, heat: Tensor | None = None, cuts: Tensor | None = None,
                 bands: Tensor | None = None):  # fmt: skip
        rows = logits.reshape(-1, logits.shape[-1])
        self.shape, self.device, self.logits = logits.shape, logits.device, rows
        if rows.stride(1) != 1:
            self.logits = rows.contiguous()
        self.heat, self.cuts, self.bands = heat, cuts, bands
        self._stats: tuple[Tensor, Tensor] | None = None

    @property
    def source(self) -> tuple[Tensor, ...]:
        """The first arguments of every kernel that reads scores."""
        given = (self.heat, self.cuts, self.bands)
        return self.logits, *(self.logits if x is None else x for x in given)

    @property
    def flags(self) -> dict:
        """Its constants that say what there is."""
        return {
            "SHIFT": SHIFTS[self.logits.dtype], "HEATED": self.heat is not None, "CUT": self.cuts is not None,
            "BANDED": self.bands is not None,
        }  # fmt: skip

    @property
    def stats(self) -> tuple[Tensor, Tensor]:
        """For each block of each row the largest score m and the sum of exp(score - m): `[M, blocks]`."""
        if self._stats is None:
            self._stats = self._sums()[:2]
        return self._stats

    def _sums(self, moments: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        from specdec.sampling.scores_kernel import launch_sums

        return launch_sums(self.source, self.flags, moments)

    def log_total(self) -> tuple[Tensor, Tensor]:
        """The largest score and the logarithm of the sum of all exp(score), `[M]` float64."""
        largest, sums = (x.double() for x in self.stats)
        top = largest.amax(1)
        return top, top + ((largest - top[:, None]).exp() * sums).sum(1).log()

    def largest(self) -> Tensor:
        """The largest score at each position, `[...]`."""
        return self.stats[0].amax(1).view(self.shape[:-1])

    def entropy(self) -> Tensor:
        """`[M]` float64: in nats."""
        largest, sums, moments = self._sums(moments=True)
        assert moments is not None
        self._stats = largest, sums  # the same pass gives them
        _, log_total = self.log_total()
        return log_total - ((largest.double() - log_total[:, None]).exp() * moments).nansum(1)

    def _with(self, **changed: Tensor) -> "Warped":
        kept = {"heat": self.heat, "cuts": self.cuts, "bands": self.bands}
        found = Warped(self.logits, **kept | changed)
        found.shape = self.shape
        return found

    def heated(self, temperature: Tensor) -> "Warped":
        """Divided by `temperature [M]`."""
        return self._with(heat=temperature.float().contiguous())

    def cut(self, numbers: Tensor, kind: int) -> "Warped":
        """Without what top-p (kind 0) or top-k (kind 1) removes; see `ties_kernel.launch_threshold`."""
        from specdec.sampling.ties_kernel import launch_threshold

        cuts, *stats = launch_threshold(self.source, self.flags, *self.stats, numbers.double(), kind)
        if self.cuts is not None:
            (low, first), (lower, before) = cuts.unbind(1), self.cuts.unbind(1)
            mine = torch.where(low == lower, torch.maximum(first, before), torch.where(low > lower, first, before))
            cuts = torch.stack([torch.maximum(low, lower), mine], 1)
        found = self._with(cuts=cuts)
        found._stats = stats[0], stats[1]
        return found

    def within(self, lowest: Tensor, highest: Tensor | None = None) -> "Warped":
        """Without scores outside of `lowest [M]` to `highest [M]` (None: no limit), of which some must be inside."""
        highest = torch.full_like(lowest, math.inf) if highest is None else highest
        band = torch.stack([lowest, highest], 1).float()
        if self.bands is not None:
            band = torch.stack([torch.maximum(band[:, 0], self.bands[:, 0]),
                                torch.minimum(band[:, 1], self.bands[:, 1])], 1)  # fmt: skip
        return self._with(bands=band)

    def above(self, score: Tensor) -> "Warped":
        """Without scores below `score [M]`, or below the largest where that is smaller."""
        return self.within(torch.minimum(score, self.log_total()[0]))

    def nearest(self, outside: Tensor, centre: Tensor) -> Tensor:
        """The distance from `centre [M]` of the farthest scores that stay if a share `outside [M]` may go."""
        from specdec.sampling.threshold_kernel import launch_distance

        return launch_distance(self.source, self.flags, *self.stats, outside.double(), centre)


Scores = Tensor | Warped


def as_unwritten(scores: Scores, impl: str | None) -> Warped | None:
    """Scores for a kernel; None where PyTorch is to run."""
    if isinstance(scores, Warped):
        return scores
    reason = lambda: None if scores.dtype in SHIFTS else f"it takes float32, float16 or bfloat16, got {scores.dtype}"
    return Warped(scores) if resolve(impl, scores.device, reason) == "triton" else None


def _heated(scores: Warped, temperature: Tensor, warper: Warper) -> Warped | None:
    return scores.heated(temperature) if scores.heat is None and scores.bands is None else None


def _top_k(scores: Warped, k: Tensor, warper: Warper) -> Warped | None:
    # tokens are counted by their logits, from the highest on, which a band may have removed
    return scores.cut(k, kind=1) if scores.bands is None else None


def _top_p(scores: Warped, outside: Tensor, warper: Warper) -> Warped | None:
    return scores.cut(outside, kind=0) if warper.keep == 1 else None


def _min_p(scores: Warped, share: Tensor, warper: Warper) -> Warped | None:
    return scores.above(scores.log_total()[0] + share.double().log()) if warper.keep == 1 else None


def _epsilon(scores: Warped, epsilon: Tensor, warper: Warper) -> Warped | None:
    return scores.above(scores.log_total()[1] + epsilon.double().log()) if warper.keep == 1 else None


def _eta(scores: Warped, epsilon: Tensor, warper: Warper) -> Warped | None:
    log = epsilon.double().log()
    return _epsilon(scores, torch.minimum(log, log / 2 - scores.entropy()).exp(), warper)


def _typical(scores: Warped, mass: Tensor, warper: Warper) -> Warped | None:
    if warper.keep > 1:
        return None
    entropy = scores.entropy()
    centre = (scores.log_total()[1] - entropy).float()
    reach = scores.nearest(1 - mass.double(), centre)
    below, above = (torch.full_like(centre, x) for x in (-math.inf, math.inf))  # the last token that stays is inside
    return scores.within((centre - reach).nextafter(below), (centre + reach).nextafter(above))


def _same(scores: Warped, number: None, warper: Warper) -> Warped:
    return scores  # a constant changes no distribution


LAZY: dict[type, Callable[..., Warped | None]] = {
    hf.TemperatureLogitsWarper: _heated, hf.TopKLogitsWarper: _top_k, hf.TopPLogitsWarper: _top_p,
    hf.MinPLogitsWarper: _min_p, hf.EpsilonLogitsWarper: _epsilon, hf.EtaLogitsWarper: _eta,
    hf.TypicalLogitsWarper: _typical, hf.LogitNormalization: _same,
}  # fmt: skip


def warp_lazily(warpers: Sequence[Warper], numbers: Tensor, logits: Tensor, impl: str | None = None) -> Warped | None:
    """`warpers.warp` of `logits [..., V]`, with `numbers [P, M]`, unwritten; None where kernels cannot do that."""

    def reason() -> str | None:
        if logits.dtype not in SHIFTS:
            return f"it takes float32, float16 or bfloat16 logits, got {logits.dtype}"
        others = [w.kind.__name__ for w in warpers if w.kind not in LAZY or w.filter_value != -math.inf]
        return f"it writes scores for {', '.join(others)}" if others else None

    if resolve(impl, logits.device, reason) == "reference":
        return None
    scores, rest = Warped(logits), iter(numbers.float().unbind(0))
    for warper in warpers:
        done = LAZY[warper.kind](scores, next(rest) if has_number(warper.kind) else None, warper)
        if done is None:
            return None
        scores = done
    return scores
