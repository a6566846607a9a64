import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

from attention import PagedKVCache
from specdec.planning.theory import expected_speedup
from specdec.report.cache_plots import plot_pages
from specdec.report.intervals import Estimate
from specdec.report.plots import (
    SpeedupPoint,
    html_by_round,
    node_acceptance,
    plot_acceptance_by_position,
    plot_comparison,
    plot_methods,
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


def point(label, alpha, speedup):
    return SpeedupPoint(label, Estimate(alpha, alpha - 0.1, alpha + 0.05), Estimate(speedup, speedup - 0.2, 9.0))


def test_speedups_and_theory_are_drawn_where_they_are(axes):
    points = [point("code, T=0", 0.8, 2.1), point("prose, T=1", 0.5, 0.9)]
    assert plot_speedup_against_theory(axes, points, 4, 0.1, 1.2) is axes
    curve, *marks, one = axes.get_lines()
    xs, ys = curve.get_data()
    assert (xs[0], xs[-1]) == (0, 1) and ys == pytest.approx([expected_speedup(x, 4, 0.1, 1.2) for x in xs])
    assert [(*m.get_xdata(), *m.get_ydata()) for m in marks] == [(0.8, 2.1), (0.5, 0.9)]
    named = [text for text in axes.texts if text.get_text()]
    assert [(t.get_text(), t.xy) for t in named] == [("code, T=0", (0.8, 2.1)), ("prose, T=1", (0.5, 0.9))]
    assert [text.get_color() for text in named] == [mark.get_color() for mark in marks]
    assert set(one.get_ydata()) == {1}
    wide, tall = axes.collections[:2]
    assert wide.get_segments()[0] == pytest.approx(np.array([[0.7, 2.1], [0.85, 2.1]]))
    assert tall.get_segments()[0] == pytest.approx(np.array([[0.8, 1.9], [0.8, 9.0]]))


def test_theory_alone_can_be_drawn(axes):
    plot_speedup_against_theory(axes, [], 1, 0.0, 1.0)
    assert axes.get_lines()[0].get_ydata()[-1] == 2 and not axes.texts


def test_texts_of_the_theory_figure_lie_apart_and_cover_no_point():
    """The points that `make demo` found, three of them almost in one place; the page is that of the demo."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), dpi=120, layout="constrained")
    plot_acceptance_by_position(left, {"greedy": GREEDY, "sampled": SAMPLED}, {"sampled": 0.7})
    alphas, speedups = (0.81, 0.8, 0.92, 0.94, 0.68, 0.62, 0.82, 0.88), (1.72, 1.74, 1.94, 2.19, 1.44, 1.3, 1.68, 1.66)
    found = list(zip(alphas, speedups, strict=True))
    points = [
        SpeedupPoint(f"editing, T={n}", Estimate(a, a - 0.05, a + 0.05), Estimate(s, s - 0.2, s + 0.2))
        for n, (a, s) in enumerate(found)
    ]
    plot_speedup_against_theory(right, points, 3, 0.12, 1.21, note="why the points lie below the curve, in words " * 5)
    figure.canvas.draw()
    labels = [text.get_window_extent() for text in right.texts if text.get_text()]
    words = [*labels, right.get_legend().get_window_extent(), right.xaxis.label.get_window_extent()]
    words += [tick.get_window_extent() for tick in right.get_xticklabels() if tick.get_position()[0] <= 1]
    assert len(labels) == len(points) + 1
    assert not [(i, j) for i, one in enumerate(words) for j, other in enumerate(words[:i]) if one.overlaps(other)]
    assert all(figure.bbox.contains(*corner) for box in words for corner in (box.min, box.max))
    for x, y in right.transData.transform(found):
        assert not [box for box in words if box.contains(x, y)]
    pyplot.close(figure)


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


@pytest.mark.parametrize(
    ("tree", "labels"),
    [
        (TokenTree.kary(3, 3), [f"token {n}" for n in range(40)]),
        (TokenTree.from_widths((63,)), None),
        (TokenTree.from_widths((5, 4)), ["return"] * 26),
        (TokenTree.chain(12), None),
        (TokenTree.chain(0), None),
    ],
)
def test_names_of_nodes_lie_apart(tree, labels):
    figure = tree.plot(labels=labels)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == tree.size
    assert not [(i, j) for i, one in enumerate(boxes) for j, other in enumerate(boxes[:i]) if one.overlaps(other)]
    pyplot.close(figure)


def test_names_are_light_on_dark_nodes():
    figure = TREE.plot(measured=[1, 0.9, 0.1, 0, 0, 0])
    assert [text.get_color() for text in figure.axes[0].texts] == ["black"] * 2 + ["white"] * 4
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
    measured = {n: Estimate(s, s - 0.1, s + 0.3) for n, s in ((1, 1.2), (2, 1.6), (4, 1.5))}
    plot_speedup_by_length(axes, measured, {1: 1.3, 2: 1.5, 4: 1.7})
    stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert [(*star.get_xdata(), *star.get_ydata()) for star in stars] == [(2, 1.6), (4, 1.7)]
    (bars,) = axes.containers[0][2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([1.1, 1.5])


def test_bars_stand_where_their_kind_is(axes):
    exact = lambda value: Estimate(value, value - 0.5, value + 0.25)
    values = {"a": {"code": exact(1.0), "prose": exact(2.0)}, "b": {"code": None, "prose": exact(3.0)}}
    plot_comparison(axes, values, "Tokens", "tokens a round")
    assert (axes.get_title(), axes.get_ylabel()) == ("Tokens", "tokens a round")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["code", "prose"]
    bars = [drawn for drawn in axes.containers if isinstance(drawn, BarContainer)]
    heights = [[bar.get_height() for bar in group] for group in bars]
    assert heights[0] == [1, 2] and np.isnan(heights[1][0]) and heights[1][1] == 3
    (whiskers,) = bars[0].errorbar[2]
    assert [segment[:, 1].tolist() for segment in whiskers.get_segments()] == [[0.5, 1.25], [1.5, 2.25]]


def test_four_panels_have_titles_and_a_legend_that_hides_no_bar():
    plain = {"code": RoundStats((0,) * 2, (0,) * 2, (1,) * 2, (0.05,) * 2)}
    figure = plot_methods({f"method {n}": {"code": rounds} for n, rounds in enumerate([GREEDY, SAMPLED] * 4)}, plain)
    figure.canvas.draw()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Tokens per round", "Acceptance rate", "Overhead", "Speedup"]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 8
    box = legend.get_window_extent()
    assert not [axes for axes in figure.axes if box.overlaps(axes.get_tightbbox())]
    heights = [axes.patches[0].get_height() for axes in figure.axes]
    assert heights == pytest.approx([9 / 4, 5 / 10, 2, 9 / 8])
    pyplot.close(figure)


@pytest.mark.parametrize("draw", ["positions", "theory", "lengths"])
def test_legends_lie_below_the_axes(axes, draw):
    if draw == "positions":
        plot_acceptance_by_position(axes, {"greedy": GREEDY, "sampled": SAMPLED}, {"sampled": 0.7})
    elif draw == "theory":
        plot_speedup_against_theory(axes, [point("a", 0.8, 2.1)], 4, 0.1, 1.2)
    else:
        plot_speedup_by_length(axes, {1: Estimate(1.2, 1.1, 1.3)}, {1: 1.3})
    axes.figure.canvas.draw()
    legend = axes.get_legend().get_window_extent()
    assert legend.y1 < axes.bbox.y0 and not legend.overlaps(axes.xaxis.label.get_window_extent())


def test_pages_show_owners_letters_and_tables(axes):
    cache = PagedKVCache(num_layers=1, num_pages=3, page_size=2, num_kv_heads=1, head_dim=1)
    first = cache.add()
    cache.append([first], [3])
    second = cache.fork(first)
    gone = cache.add()
    cache.free(gone)
    owners = {"A": (first, "red"), "B": (second, "blue"), "C": (gone, "green")}
    assert plot_pages(axes, cache, owners, lambda slot: "abcdef"[slot], "shared") is axes
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    filled = [to_hex(patch.get_facecolor()) for patch in axes.patches if patch.get_fill()]
    assert filled == [to_hex(colour) for colour in ("red", "blue")] * 2
    assert axes.get_title(loc="left") == "shared        block tables: A = [0, 1]    B = [0, 1]"


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
