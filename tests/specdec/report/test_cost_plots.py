"""Figures of costs: parts of a round add up, lines have what was measured, the best length has its star."""

import matplotlib
import pytest

matplotlib.use("Agg")

from specdec.planning.costs import Costs
from specdec.report.cost_plots import (
    parts_of_round,
    plot_conditional_acceptance,
    plot_round_parts,
    plot_speedups_by_length,
    plot_verification_cost,
)
from specdec.report.intervals import Estimate

COSTS = Costs(0.01, 0.2, (1, 4), (1.0, 1.6))


def test_parts_of_a_round_are_its_whole_time():
    parts = parts_of_round(COSTS, 3, 3, 0.03)
    assert parts == {
        "drafting": pytest.approx(0.006),
        "verifying": pytest.approx(0.016),
        "the rest": pytest.approx(0.008),
    }
    quick = parts_of_round(COSTS, 3, 3, 0.011)  # a captured round, quicker than its forwards one by one
    assert sum(quick.values()) == pytest.approx(0.011) and quick["the rest"] == 0


def test_bars_of_parts_lie_one_on_the_other(axes):
    plot_round_parts(axes, {"plain": {"verifying": 0.01}, "chain": {"drafting": 0.006, "verifying": 0.016}})
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"verifying": [10.0, 16.0], "drafting": [0.0, 6.0]}
    assert [bar.get_x() for bar in axes.containers[1]] == [10.0, 16.0] and axes.get_xlim()[0] == 0


def test_verification_has_a_line_for_each_name(axes):
    plot_verification_cost(axes, {"batch 1": COSTS, "heads": Costs(0.01, 0.0, (1, 2), (1.0, 1.1))})
    assert {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()[:2]} == {
        "batch 1: draft step 0.20": [1.0, 1.6],
        "heads": [1.0, 1.1],
    }
    assert axes.get_ylim()[0] == 0 and list(axes.get_lines()[2].get_ydata()) == [1, 1]


def test_the_best_length_has_a_star(axes):
    plot_speedups_by_length(axes, {"chain": {4: Estimate(1.2, 1.0, 1.3), 2: Estimate(1.5, 1.4, 1.6)}}, "speedup")
    (bars,) = axes.containers
    assert list(bars[0].get_xdata()) == [2, 4]
    (star,) = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (2, 1.5)
    assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "speedup"


def test_a_position_without_trials_has_no_point(axes):
    plot_conditional_acceptance(axes, {"code": [0.8, None, 0.5], "prose": [None]})
    code, prose = axes.get_lines()
    assert list(code.get_xdata()) == [1, 3] and list(prose.get_xdata()) == []
