"""Measured figures with their intervals, as the plots show them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

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


def spread(estimates: Sequence[Estimate | None]) -> list[list[float]]:
    """The lengths of error bars below and above the values, `[2, n]`; 0 where there is no estimate.

    >>> spread([Estimate(2.0, 1.5, 4.0), None])
    [[0.5, 0.0], [2.0, 0.0]]
    """
    known = [one or Estimate(0.0, 0.0, 0.0) for one in estimates]
    return [[one.value - one.low for one in known], [one.high - one.value for one in known]]


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


def geometric_mean(ratios: Sequence[float]) -> Estimate | None:
    """The geometric mean with a 95% interval, Student's on the logarithms; None for fewer than three ratios."""
    if len(ratios) < 3:
        return None
    logs = [log(ratio) for ratio in ratios]
    middle, half = statistics.fmean(logs), student_quantile(len(logs) - 1) * statistics.stdev(logs) / sqrt(len(logs))
    return Estimate(exp(middle), exp(middle - half), exp(middle + half))


def student_quantile(free: int, level: float = 0.975) -> float:
    """Student's quantile for `free` degrees of freedom, at least 2, expanded in 1 / `free` around the normal one.

    Source: Abramowitz and Stegun 26.7.5."""
    z = statistics.NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / free**power for power, term in enumerate(terms, 1))


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
