"""Tokens against nodes and heat maps of choices show what they are given, and leave out what is missing."""

import matplotlib
import numpy as np

matplotlib.use("Agg")

from specdec.report.intervals import Estimate
from specdec.report.stats import RoundStats
from specdec.report.tree_plots import plot_choices, plot_tokens_by_budget


def test_tokens_against_nodes_expected_and_measured(axes):
    measured = {"chain": {8: Estimate(3.0, 2.5, 3.5), 2: Estimate(1.8, 1.7, 1.9)}, "dynamic": {4: None}}
    plot_tokens_by_budget(axes, {"chain": {4: 2.5, 2: 1.7}, "best tree": {4: 2.6}}, measured)
    (bars,) = axes.containers
    assert list(bars[0].get_xdata()) == [2, 8] and list(bars[0].get_ydata()) == [1.8, 3.0]
    assert [tuple(segment[:, 1]) for segment in bars[2][0].get_segments()] == [(1.7, 1.9), (2.5, 3.5)]
    dashed = {line.get_label(): line for line in axes.get_lines() if line.get_linestyle() == "--"}
    assert dashed.keys() == {"chain, expected", "best tree"}
    assert list(dashed["chain, expected"].get_ydata()) == [1.7, 2.5]
    assert dashed["chain, expected"].get_color() == bars[0].get_color()
    assert axes.get_ylim()[0] == 0 and any(set(line.get_ydata()) == {1} for line in axes.get_lines())


def test_a_choice_that_was_never_offered_is_a_blank(axes):
    plot_choices(axes, [[0.75, 0.1], [0.5, None], [0.4]], ["a", "b", "c"], [[4, 10], [2, 0], [5]])
    shown = axes.images[0].get_array()
    assert np.isnan(shown.filled(np.nan)).tolist() == [[False, False], [False, True], [False, True]]
    assert sorted(text.get_text() for text in axes.texts) == ["0.10\nof 10", "0.40\nof 5", "0.50\nof 2", "0.75\nof 4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_choices_are_counted_where_they_are_offered():
    passed = (((2, 0), (3, None)), ((2, 1), (1, 0), (0, None)), ((1, None),), ())
    stats = RoundStats((5, 3, 1, 0), (1, 2, 0, 0), (2, 3, 1, 1), (), depths=(2, 2, 1, 0), ranks=passed)
    assert stats.choice_trials() == (((1, 3), (1, 2)), ((1, 2), (0, 1), (0, 1)))
    assert RoundStats((), (), (), ()).choice_trials() == ()
