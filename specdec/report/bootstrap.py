"""Bootstrap intervals of ratios of sums over prompts."""

import statistics
from collections.abc import Sequence
from math import sqrt

import numpy as np

from specdec.report.intervals import Estimate, student_quantile

RESAMPLES = 4000


def ratio_interval(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]], level: float = 0.95,
                   seed: int = 0) -> Estimate | None:  # fmt: skip
    """A product of ratios of sums with its interval over clusters; None for fewer than three, or a sum of zero.

    The value is the product of the sums of `above[c]` over that of `below`, `[n]` numbers each, one a cluster (a
    prompt, say, with all its repeats), which are drawn again with replacement. Percentiles are expanded for few
    clusters (Hesterberg 2015, section 4.1.1).

    >>> ratio_interval([[4.0, 4.0, 4.0]], [[2.0, 2.0, 2.0]])
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    top, bottom = (np.asarray(part, dtype=float) for part in (above, below))
    count = top.shape[1]
    if count < 3 or not bottom.sum(1).all():
        return None
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    weights = np.stack([(drawn == cluster).sum(1) for cluster in range(count)], 1)  # how often each one was drawn
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (weights @ top.T).prod(1) / (weights @ bottom.T).prod(1)
    found = found[np.isfinite(found)]
    value = float(top.sum(1).prod() / bottom.sum(1).prod())
    wide = student_quantile(count - 1, (1 + level) / 2) * sqrt(count / (count - 1))
    tail = statistics.NormalDist().cdf(-wide)
    low, high = np.quantile(found, (tail, 1 - tail))
    return Estimate(value, min(value, float(low)), max(value, float(high)))
