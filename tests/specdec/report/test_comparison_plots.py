"""Figures of comparisons begin at zero, have a line at 1.0, and mark where speculation stops paying."""

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from specdec.report.comparison_plots import (
    PALETTE,
    caption,
    crossover,
    palette,
    plot_ecdf,
    plot_losslessness,
    plot_speedup_by_batch,
)
from specdec.report.intervals import Estimate
from specdec.report.markup import latex_table, markdown_table


def around(value):
    return Estimate(value, value - 0.1, value + 0.1)


@pytest.fixture
def axes():
    with palette():
        figure, axes = pyplot.subplots()
        yield axes
        caption(figure, "somewhere, " * 30)
        figure.canvas.draw()
        pyplot.close(figure)


def flat_lines(axes):
    return {line.get_ydata()[0] for line in axes.get_lines() if len(set(line.get_ydata())) == 1}


def test_speedup_against_batch_has_its_crossover(axes):
    plot_speedup_by_batch(axes, {"a": {1: around(2.0), 4: around(1.5), 16: around(0.5)}, "b": {1: around(0.5)}})
    assert axes.get_ylim()[0] == 0 and 1 in flat_lines(axes)
    stars = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "*"]
    assert stars == [pytest.approx(8.0)]
    assert [c.get_label() for c in axes.containers] == ["a", "b"]
    assert axes.containers[0][0].get_color() == PALETTE[0]


def test_where_speculation_always_or_never_pays_there_is_no_crossover():
    assert crossover({1: 2.0, 8: 1.1}) is None and crossover({1: 0.9, 8: 0.5}) is None and crossover({}) is None


def test_the_ecdf_counts_prompts(axes):
    plot_ecdf(axes, {"a": [2.0, 1.0, 3.0, 0.5]})
    line = axes.get_lines()[0]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [
        (0, 0.0), (0.5, 0.25), (1.0, 0.5), (2.0, 0.75), (3.0, 1.0)
    ]  # fmt: skip
    assert axes.get_xlim()[0] == 0 and axes.get_lines()[1].get_xdata()[0] == 1


def test_p_values_lie_beside_those_of_a_right_method(axes):
    plot_losslessness(axes, {"sampled": [0.75, 0.25], "control": [0.0]}, 1e-5)
    sampled, control, even, level = axes.get_lines()
    assert list(sampled.get_xdata()) == list(sampled.get_ydata()) == [0.25, 0.75]
    assert control.get_ydata()[0] == 1e-18, "zero has no place on a logarithmic axis"
    assert len(even.get_xdata()) > 100 and list(even.get_xdata()) == list(even.get_ydata())
    assert set(level.get_ydata()) == {1e-5} and axes.get_yscale() == "log"


def test_tables_escape_what_means_something():
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines()[2] == r"| x\|y | 1 |"
    written = latex_table(["a_b", "50%"], [["x & y", "1"]], "cap")
    assert r"a\_b & 50\% \\" in written and r"x \& y & 1 \\" in written and r"\caption{cap}" in written
