import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from specdec.plots import plot_acceptance_by_position, plot_speedup_against_theory
from specdec.stats import RoundStats, wilson_interval
from specdec.theory import expected_speedup

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
    assert [len(drawn[0].get_ydata()) for drawn in axes.containers] == [max(s.proposed, default=0) for s in stats.values()]


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
