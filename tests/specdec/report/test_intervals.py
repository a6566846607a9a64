import math
import statistics

import pytest
import scipy.stats
import torch

from specdec.report import intervals
from specdec.report.intervals import Estimate
from specdec.report.stats import RoundStats, wilson_interval

ROUNDS = RoundStats((3,) * 4, (3, 1, 0, 2), (4, 2, 1, 3), (0.2, 0.1, 0.1, 0.2))
PLAIN = RoundStats((0,) * 3, (0,) * 3, (1,) * 3, (0.04, 0.05, 0.06))
EMPTY = RoundStats((), (), (), ())


def test_an_interval_includes_its_value():
    for low, high in ((1.1, 2.0), (0.0, 0.9), (float("nan"), 2.0)):
        with pytest.raises(ValueError, match="does not include the value 1.0"):
            Estimate(1.0, low, high)


def test_shares_have_wilsons_interval():
    assert intervals.share(3, 4) == Estimate(0.75, *wilson_interval(3, 4))
    assert intervals.acceptance_rate(ROUNDS) == intervals.share(6, 12)
    assert intervals.acceptance_rate(PLAIN) is None


def test_median_and_quartiles_are_those_of_the_values():
    assert intervals.median([7.0]) == Estimate(7.0, 7.0, 7.0)
    assert intervals.median([4.0, 1.0]) == Estimate(2.5, 1.75, 3.25)
    with pytest.raises(ValueError, match="at least one value"):
        intervals.median([])


def test_means_have_the_normal_interval_over_rounds():
    found = intervals.tokens_per_round(ROUNDS)
    half = 1.96 * statistics.stdev(ROUNDS.emitted) / 2
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


def test_speedup_is_tokens_per_round_over_overhead():
    tokens, cost = intervals.tokens_per_round(ROUNDS), intervals.overhead(ROUNDS, PLAIN)
    found = intervals.speedup(ROUNDS, PLAIN)
    assert cost.value == pytest.approx(3.0) and found.value == pytest.approx(2.5 / 3)
    relative = [(one.high - one.value) / one.value for one in (tokens, cost, found)]
    assert relative[2] ** 2 == pytest.approx(relative[0] ** 2 + relative[1] ** 2)


def test_nothing_measured_is_none():
    assert intervals.tokens_per_round(EMPTY) is None
    assert intervals.overhead(EMPTY, PLAIN) is intervals.speedup(ROUNDS, EMPTY) is None


@pytest.mark.parametrize("count", [3, 4, 8, 30, 200])
def test_the_interval_of_a_geometric_mean_is_students(count):
    logs = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).tolist()
    low, high = scipy.stats.t.interval(0.95, count - 1, statistics.fmean(logs), scipy.stats.sem(logs))
    found = intervals.geometric_mean([math.exp(x) for x in logs])
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((low, high), rel=0.05 if count == 3 else 0.01)
    assert intervals.geometric_mean([1.0, 2.0]) is None
