"""Counts of drawn tokens in bins, against the distributions they should have been drawn from.

Each row has a distribution of its own, after its own text, over the same kind of bins: its 64 likeliest tokens by rank,
and the rest. The counts' covariance is the sum of the rows', and the quadratic form of the deviations is chi-square."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.auditing.chi_square import critical, detectable, tail

LIKELIEST = 64  # tokens with a bin of their own
LEAST = 10.0  # expected in a bin; bins of fewer are joined
POWER = 0.9  # with which a detectable deviation is found
COMMON = 100  # rows: a text so frequent is compared by itself, so that deviations after different texts do not cancel


@dataclass(frozen=True, slots=True)
class Comparison:
    """Drawn tokens against the target's distributions.

    rows: draws that were compared.
    statistic, freedom: of the chi-square test, with the degrees of freedom; 0: there is nothing that could vary.
    rounding: the noncentrality that twice the difference between the target's two readings explains.
    variation: the total variation between drawn and expected shares of bins, a mean over the rows' texts.
    """

    rows: int
    statistic: float
    freedom: int
    rounding: float
    variation: float

    @property
    def p_value(self) -> float:
        """The probability of such a statistic if nothing but rounding separates the two; 1 without freedom."""
        return tail(self.statistic, self.freedom, self.rounding) if self.freedom else 1.0

    def detectable(self, level: float) -> float | None:
        """The total variation, a mean over texts, that a test at `level` finds with probability `POWER` at least.

        By Cauchy and Schwarz, a total variation v of n draws has a noncentrality of at least 4 n v². None: no freedom.
        """
        if not self.freedom or critical(level, self.freedom, self.rounding) == 0:
            return None
        return min(1.0, (detectable(level, POWER, self.freedom, self.rounding) / (4 * self.rows)) ** 0.5)


def compare(bins: Tensor, texts: Tensor, expected: Tensor) -> Comparison:
    """Compare drawn `bins [n]` of rows whose text is number `texts [n]` with `expected [2, U, K]`.

    expected: the shares of K bins after each of U texts, by the target's two readings; the first one counts."""
    counts = torch.bincount(texts, minlength=expected.shape[1])
    common = (counts >= COMMON).nonzero()[:, 0].tolist()
    groups = [texts == text for text in common]
    rest = ~torch.stack(groups).any(0) if groups else torch.ones_like(texts, dtype=torch.bool)
    parts = [_of_group(bins[of], expected[:, texts[of]]) for of in [*groups, rest] if bool(of.any())]
    total = lambda name: sum(getattr(part, name) for part in parts)
    variation = sum(part.variation * part.rows for part in parts) / max(1, total("rows"))
    return Comparison(total("rows"), total("statistic"), total("freedom"), total("rounding"), variation)


def _of_group(bins: Tensor, expected: Tensor) -> Comparison:
    """Rows whose deviations are added up; `expected [2, n, K]`."""
    rows, width = len(bins), expected.shape[2]
    joined = _joined(expected[0].sum(0))
    into = torch.zeros(width, int(joined.max()) + 1, dtype=torch.float64)
    into[torch.arange(width), joined] = 1.0
    shares = expected.double() @ into  # [2, n, R]
    wanted = shares[0].sum(0)
    seen = torch.bincount(joined[bins], minlength=len(wanted)).double()
    variation = float((seen - wanted).abs().sum()) / 2 / rows
    if len(wanted) < 2:
        return Comparison(rows, 0.0, 0, 0.0, variation)
    covariance = (wanted.diag() - shares[0].T @ shares[0])[1:, 1:]
    inverse = torch.linalg.pinv(covariance, hermitian=True, rtol=1e-9)
    off, shift = (seen - wanted)[1:], 2 * (shares[1] - shares[0]).sum(0)[1:]
    return Comparison(rows, float(off @ inverse @ off), len(wanted) - 1, float(shift @ inverse @ shift), variation)


def _joined(expected: Tensor) -> Tensor:
    """For each bin the one that it joins, numbered from 0, so that all have `LEAST` expected draws, or are one.

    Bin 0 takes all small ones, and the smallest of the others where these are too few together."""
    large = expected >= LEAST
    if float(expected[~large].sum()) < LEAST and bool(large.any()):
        smallest = torch.where(large, expected, float("inf")).argmin()
        large = large & (torch.arange(len(expected)) != smallest)
    return torch.where(large, large.long().cumsum(0), 0)


def corrected(level: float, tests: Sequence[Comparison]) -> float:
    """The level of each test, so that all together keep `level` (Bonferroni); those without freedom do not count."""
    return level / max(1, sum(test.freedom > 0 for test in tests))
