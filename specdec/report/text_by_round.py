"""Texts by rounds: what was drafted in each, and the token that the target itself added.

The figure needs matplotlib."""

from collections.abc import Iterator, Sequence

from specdec.report.stats import RoundStats

Piece = tuple[str, str]  # of a round: drafted text, the target's own
BACKGROUNDS = ("#fde8c9", "#dbe9f6")  # of even and odd rounds
COLUMNS = 110
ASPECT = 0.602  # width of a letter of matplotlib's monospaced font, in font sizes
LARGEST = 10.0  # font size


def pieces_by_round(tokenizer, tokens: Sequence[int], stats: RoundStats) -> list[Piece]:
    """The new `tokens` of a row as text, round by round; the target's own token is the last of each round."""
    pieces, start = [], 0
    for emitted in stats.emitted:
        drafted, own = tokens[start : start + emitted - 1], tokens[start + emitted - 1 : start + emitted]
        pieces.append((tokenizer.decode(drafted) if len(drafted) else "", tokenizer.decode(own) if len(own) else ""))
        start += emitted
    return pieces


def plot_text_by_round(axes, pieces: Sequence[Piece], title: str, columns: int = COLUMNS):
    """A text whose background changes from round to round; tokens of the target's own are underlined."""
    from matplotlib.patches import Rectangle

    width = axes.get_window_extent().width * 72 / axes.figure.dpi
    size, line = min(LARGEST, width / columns / ASPECT), 0
    for letter, number, own, line, column in _letters(pieces, columns):
        box = Rectangle((column, line), 1, 1, color=BACKGROUNDS[number % 2], linewidth=0)
        style = dict(ha="center", va="center", family="monospace", fontsize=size)
        drawn = [axes.add_patch(box), axes.text(column + 0.5, line + 0.5, letter, **style)]
        if own:
            drawn += axes.plot([column, column + 1], [line + 0.95] * 2, color="black", linewidth=0.8)
        for one in drawn:
            one.set_in_layout(False)  # thousands of them would make the layout slow
    axes.set(xlim=(0, columns), ylim=(line + 1, 0))
    axes.set_title(title, loc="left", fontsize=9)
    axes.axis("off")
    return axes


def lines_of(pieces: Sequence[Piece], columns: int = COLUMNS) -> int:
    """How many lines `plot_text_by_round` writes."""
    return 1 + max((line for *_, line, _ in _letters(pieces, columns)), default=0)


def _letters(pieces: Sequence[Piece], columns: int) -> Iterator[tuple[str, int, bool, int, int]]:
    """Each letter with its round, whether it is the target's own, its line and its column.

    The end of a line is shown as a sign, since it too belongs to a round."""
    line = column = 0
    for number, (drafted, own) in enumerate(pieces):
        for letter, of_target in [*((x, False) for x in drafted), *((x, True) for x in own)]:
            if column == columns:
                line, column = line + 1, 0
            yield "↵" if letter == "\n" else " " if letter.isspace() else letter, number, of_target, line, column
            line, column = (line + 1, 0) if letter == "\n" else (line, column + 1)
