"""Measured figures with their intervals, as the plots show them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from specdec.report.stats import RoundStats, wilson_interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured `value` and the interval from `low` to `high` around it; raises ValueError where it lies outside."""

    value: float
    low: float
    high: float

    def __post_init__(self):
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval {self.low} … {self.high} does not include the value {self.value}")


def share(successes: int, trials: int) -> Estimate | None:
    """A proportion with its 95% Wilson interval; None without trials.

    >>> share(0, 0) is None
    True
    """
    return Estimate(successes / trials, *wilson_interval(successes, trials)) if trials else None


def median(values: Sequence[float]) -> Estimate:
    """The median, from the lower to the upper quartile; raises ValueError without values.

    >>> median([5.0, 1.0, 2.0, 4.0, 3.0])
    Estimate(value=3.0, low=2.0, high=4.0)
    """
    if not values:
        raise ValueError("a median needs at least one value, got none")
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Estimate(quartiles[1], quartiles[0], quartiles[2])


def tokens_per_round(stats: RoundStats) -> Estimate | None:
    """Tokens per round with a 95% interval over rounds (normal approximation); None without rounds."""
    return _ratio([stats.emitted])


def acceptance_rate(stats: RoundStats) -> Estimate | None:
    """Accepted over proposed tokens with the 95% Wilson interval; None without proposed tokens."""
    return share(sum(stats.accepted), sum(stats.proposed))


def overhead(stats: RoundStats, plain: RoundStats) -> Estimate | None:
    """The mean time of a round over that of a round of `plain`, with a 95% interval; None without times.

    `plain` are rounds of decoding without a draft, one step each, best of the same prompts in the same run."""
    return _ratio([stats.seconds], [plain.seconds])


def speedup(stats: RoundStats, plain: RoundStats) -> Estimate | None:
    """Tokens per round over the overhead, with a 95% interval; None without rounds or times."""
    return _ratio([stats.emitted, plain.seconds], [stats.seconds])


def _ratio(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]] = ()) -> Estimate | None:
    """The product of the means of `above` over that of `below`; relative variances of independent means add up."""
    value, variance = 1.0, 0.0
    for samples, power in [*((s, 1) for s in above), *((s, -1) for s in below)]:
        if not samples:
            return None
        mean = statistics.fmean(samples)
        value *= mean**power
        if len(samples) > 1:
            variance += statistics.variance(samples) / len(samples) / mean**2
    half = 1.96 * abs(value) * sqrt(variance)
    return Estimate(value, value - half, value + half)
