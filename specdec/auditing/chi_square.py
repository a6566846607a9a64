"""The chi-square distribution, central and noncentral, without scipy.

The noncentral one is a Poisson mixture of central ones (Johnson, Kotz and Balakrishnan 1995, chapter 29)."""

from collections.abc import Callable
from math import log, sqrt

import torch


def tail(x: float, freedom: int, noncentrality: float = 0.0) -> float:
    """The probability of a value above `x`, with `freedom` degrees of freedom.

    >>> round(tail(3.841459, 1), 6), round(tail(20.0, 4, 10.0), 6)
    (0.05, 0.181688)
    """
    half = noncentrality / 2
    spread = 12 * sqrt(half) + 40
    terms = torch.arange(max(0.0, float(int(half - spread))), half + spread, dtype=torch.float64)
    weights = (terms * log(half) - half - torch.lgamma(terms + 1)).exp() if half else (terms == 0).double()
    central = torch.special.gammaincc(freedom / 2 + terms, torch.full_like(terms, max(x, 0.0) / 2))
    return float((weights * central).sum().clamp(max=1.0))


def critical(level: float, freedom: int, noncentrality: float = 0.0) -> float:
    """The value that is exceeded with probability `level`.

    >>> round(critical(0.05, 1), 4)
    3.8415
    """
    return _crossing(lambda x: tail(x, freedom, noncentrality) <= level, freedom + noncentrality)


def detectable(level: float, power: float, freedom: int, noncentrality: float = 0.0) -> float:
    """The least noncentrality with which a test at `level` fails with probability `power`.

    noncentrality: what the test allows for, so that its critical value is that of this noncentrality.

    >>> round(detectable(0.05, 0.9, 1), 3)
    10.507
    """
    limit = critical(level, freedom, noncentrality)
    return _crossing(lambda other: tail(limit, freedom, other) >= power, noncentrality + freedom)


def _crossing(reached: Callable[[float], bool], start: float) -> float:
    """The least number from 0 on that has `reached`, which stays so above it."""
    low, high = 0.0, max(start, 1.0)
    while not reached(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
