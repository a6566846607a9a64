"""A text by rounds: every letter with its round's colour, the target's own underlined."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from specdec.report.stats import RoundStats
from specdec.report.text_by_round import BACKGROUNDS, lines_of, pieces_by_round, plot_text_by_round


class Letters:
    def decode(self, tokens):
        return "".join(chr(token) for token in tokens)


def test_pieces_are_what_was_drafted_and_the_targets_own():
    stats = RoundStats((2, 2, 0), (1, 2, 0), (2, 3, 1), ())
    assert pieces_by_round(Letters(), [ord(c) for c in "abcde"], stats) == [("a", "b"), ("cd", "e"), ("", "")]


def test_every_letter_has_the_colour_of_its_round():
    figure, axes = pyplot.subplots(figsize=(10, 2))
    pieces = [("ab", "\n"), ("", "c"), ("d", "e")]
    plot_text_by_round(axes, pieces, "draft", columns=2)
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    colours = [to_rgba(BACKGROUNDS[number]) for number in (0, 0, 0, 1, 0, 0)]
    assert [box.get_facecolor() for box in boxes] == colours
    assert [box.get_xy() for box in boxes] == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 2), (0, 3)]
    assert [text.get_text() for text in axes.texts] == list("ab↵cde")
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [0, 0, 0]  # the end of a line, c and e
    assert lines_of(pieces, 2) == 4 and lines_of([], 2) == 1 and axes.get_title(loc="left") == "draft"
    figure.canvas.draw()
    pyplot.close(figure)
