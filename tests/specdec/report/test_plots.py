import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from specdec.planning.theory import expected_speedup
from specdec.report.plots import (
    html_by_round,
    node_acceptance,
    plot_acceptance_by_position,
    plot_comparison,
    plot_speedup_against_theory,
    plot_speedup_by_length,
)
from specdec.report.stats import RoundStats, wilson_interval
from specdec.trees.tree import TokenTree

GREEDY = RoundStats(proposed=(3, 3, 3, 1), accepted=(3, 1, 0, 1), emitted=(4, 2, 1, 2), seconds=(0.1,) * 4)
SAMPLED = RoundStats(proposed=(2, 2, 2), accepted=(2, 2, 1), emitted=(3, 3, 2), seconds=(0.1,) * 3)
UNREACHED = RoundStats(proposed=(2, 2), accepted=(0, 0), emitted=(1, 1), seconds=(0.1,) * 2)
EMPTY = RoundStats((), (), (), ())
PLAIN = RoundStats(proposed=(0,), accepted=(0,), emitted=(1,), seconds=(0.1,))


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots()
    yield axes
    figure.canvas.draw()  # every test's figure can also be drawn
    pyplot.close(figure)


def dashed(axes):
    return [line for line in axes.get_lines() if line.get_linestyle() == "--"]


def test_acceptance_and_its_intervals_are_the_statistics(axes):
    stats = {"greedy": GREEDY, "sampled": SAMPLED}
    assert plot_acceptance_by_position(axes, stats) is axes
    assert len(axes.containers) == 2
    for (label, rounds), drawn in zip(stats.items(), axes.containers, strict=True):
        line, _, (bars,) = drawn
        assert drawn.get_label() == label
        assert line.get_ydata() == pytest.approx(rounds.conditional_acceptance)
        assert [round(x) for x in line.get_xdata()] == list(range(1, len(rounds.conditional_acceptance) + 1))
        bounds = [wilson_interval(*rounds.trials(i)) for i in range(1, len(rounds.conditional_acceptance) + 1)]
        assert [tuple(segment[:, 1]) for segment in bars.get_segments()] == [pytest.approx(b) for b in bounds]
    assert not dashed(axes)


def test_expected_acceptance_is_a_dashed_line_in_its_labels_colour(axes):
    plot_acceptance_by_position(axes, {"greedy": GREEDY, "sampled": SAMPLED}, {"sampled": 0.7, "unknown": 0.1})
    (line,) = dashed(axes)
    assert set(line.get_ydata()) == {0.7}
    assert line.get_color() == axes.containers[1][0].get_color() != axes.containers[0][0].get_color()


def test_a_position_without_trials_is_left_out_of_the_line(axes):
    plot_acceptance_by_position(axes, {"unreached": UNREACHED})
    drawn = axes.containers[0][0].get_ydata()
    assert drawn[0] == 0 and np.isnan(drawn[1])


@pytest.mark.parametrize("stats", [{}, {"empty": EMPTY}, {"plain": PLAIN}, {"plain": PLAIN, "greedy": GREEDY}])
@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_no_trials_at_all_draw_nothing_and_do_not_crash(axes, stats):
    plot_acceptance_by_position(axes, stats, {"empty": 0.5})
    assert [len(drawn[0].get_ydata()) for drawn in axes.containers] == [
        max(s.proposed, default=0) for s in stats.values()
    ]


def test_speedups_and_theory_are_drawn_where_they_are(axes):
    points = [("code, T=0", 0.8, 2.1), ("prose, T=1", 0.5, 0.9)]
    assert plot_speedup_against_theory(axes, points, 4, 0.1, 1.2) is axes
    curve, *marks, one = axes.get_lines()
    xs, ys = curve.get_data()
    assert (xs[0], xs[-1]) == (0, 1) and ys == pytest.approx([expected_speedup(x, 4, 0.1, 1.2) for x in xs])
    assert [(*m.get_xdata(), *m.get_ydata()) for m in marks] == [(0.8, 2.1), (0.5, 0.9)]
    assert [(t.get_text(), t.xy) for t in axes.texts] == [("code, T=0", (0.8, 2.1)), ("prose, T=1", (0.5, 0.9))]
    assert set(one.get_ydata()) == {1}


def test_theory_alone_can_be_drawn(axes):
    plot_speedup_against_theory(axes, [], 1, 0.0, 1.0)
    assert axes.get_lines()[0].get_ydata()[-1] == 2 and not axes.texts


def test_marginal_acceptance_is_the_share_of_all_rounds_and_theory_a_power(axes):
    plot_acceptance_by_position(axes, {"greedy": GREEDY}, {"greedy": 0.5}, marginal=True)
    assert axes.containers[0][0].get_ydata() == pytest.approx(GREEDY.marginal_acceptance)
    assert dashed(axes)[0].get_ydata() == pytest.approx([0.5, 0.25, 0.125])


TREE = TokenTree((None, 0, 0, 1, 1, 3))


@pytest.mark.parametrize(
    "options",
    [{}, {"expected": [1, 0.6, 0.2, 0.3, 0.1, 0.2]}, {"measured": [1, 0.5, 0.25, 0, 0, 0]}, {"labels": list("abcdef")}],
)
def test_a_tree_is_drawn_beside_its_mask(options):
    figure = TREE.plot(**options)
    left, right = figure.axes[:2]
    figure.canvas.draw()
    assert len(left.collections) == TREE.size and len(left.get_lines()) == TREE.size - 1
    assert np.asarray(right.images[0].get_array()).tolist() == [
        [bool(TREE.bits[n][0] >> m & 1) for m in range(TREE.size)] for n in range(TREE.size)
    ]
    assert [text.get_text() for text in left.texts] == options.get("labels", [str(n) for n in range(TREE.size)])
    places = [tuple(dots.get_offsets()[0]) for dots in left.collections]
    assert [-y for _, y in places] == list(TREE.depths) and len(set(places)) == TREE.size
    if "expected" in options:
        sizes = [dots.get_sizes()[0] for dots in left.collections]
        assert np.argsort(sizes, kind="stable").tolist() == np.argsort(options["expected"], kind="stable").tolist()
    pyplot.close(figure)


@pytest.mark.parametrize("name", ["expected", "measured", "labels"])
def test_a_value_for_every_node_or_none(name):
    with pytest.raises(ValueError, match=f"{name} needs one entry for each of 6 nodes, got 2"):
        TREE.plot(**{name: ["1", "1"]})


def test_measured_acceptance_of_nodes_follows_the_ranks():
    ranks = (((2, 0), (2, 1)), ((2, 1),), ((2, None),), ((2, 0), (2, None)))
    stats = RoundStats((5,) * 4, (2, 1, 0, 1), (3, 2, 1, 2), (0.1,) * 3, ranks=ranks, depths=(3,) * 4)
    assert node_acceptance(TREE, stats) == [1, 0.5, 0.25, 0, 0.25, 0]


def test_the_best_length_has_the_star(axes):
    plot_speedup_by_length(axes, {1: 1.2, 2: 1.6, 4: 1.5}, {1: 1.3, 2: 1.5, 4: 1.7})
    stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert [(*star.get_xdata(), *star.get_ydata()) for star in stars] == [(2, 1.6), (4, 1.7)]


def test_bars_stand_where_their_kind_is(axes):
    plot_comparison(axes, {"a": {"code": 1.0, "prose": 2.0}, "b": {"prose": 3.0}}, "tokens")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["code", "prose"]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights[0] == [1, 2] and np.isnan(heights[1][0]) and heights[1][1] == 3


def test_text_by_round_is_whole_escaped_and_underlines_the_targets_tokens():
    class Letters:
        def decode(self, tokens):
            return "".join(chr(token) for token in tokens)

    html = html_by_round(Letters(), [ord(c) for c in "ab<cd"], RoundStats((2, 2), (1, 2), (2, 3), (0.1,)))
    assert html.count("background") == 2 and "&lt;" in html
    assert (
        html.count("underline") == 2
        and '<span style="text-decoration: underline">b</span>' in html
        and "<span>&lt;c</span>" in html
    )
