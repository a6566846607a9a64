"""Figures of what trees are worth: tokens against the nodes they spend, and how often each choice is right.

Need matplotlib. A value that was not measured is left out."""

from collections.abc import Mapping, Sequence

import numpy as np

from specdec.report.comparison_plots import MARKERS
from specdec.report.intervals import Estimate, spread


def plot_tokens_by_budget(axes, expected: Mapping[str, Mapping[int, float]],
                          measured: Mapping[str, Mapping[float, Estimate | None]]):  # fmt: skip
    """Tokens per round of each family of trees against the nodes that are verified, the root included.

    Expected ones are dashed lines, measured ones have intervals; a family has one colour. The line at 1.0 is plain
    decoding."""
    known = {name: {n: one for n, one in of.items() if one is not None} for name, of in measured.items()}
    for number, name in enumerate(dict.fromkeys([*expected, *(name for name, of in known.items() if of)])):
        colour, marker = f"C{number}", MARKERS[number % len(MARKERS)]
        if expected.get(name):
            label = f"{name}, expected" if known.get(name) else name
            axes.plot(*zip(*sorted(expected[name].items()), strict=True), "--", color=colour, linewidth=1, label=label)
        if known.get(name):
            sizes = sorted(known[name])
            found = [known[name][n] for n in sizes]
            style = dict(color=colour, marker=marker, capsize=3, label=name)
            axes.errorbar(sizes, [one.value for one in found], yerr=spread(found), **style)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="nodes that are verified in a round, the root included", ylabel="tokens per round")
    axes.set_ylim(bottom=0)
    return axes


def plot_choices(axes, shares: Sequence[Sequence[float | None]], names: Sequence[str],
                 counts: Sequence[Sequence[int]] | None = None):  # fmt: skip
    """A heat map of how often each choice was right: a row for each of `names`, a column for each rank.

    counts: how often each one was offered, written below its share."""
    ranks = max(map(len, shares), default=0)
    table = np.full((len(shares), ranks), np.nan)
    for row, of_row in enumerate(shares):
        for rank, share in enumerate(of_row):
            if share is not None:
                table[row, rank] = share
                colour = "white" if share < 0.6 else "black"
                shown = f"{share:.2f}" if counts is None else f"{share:.2f}\nof {counts[row][rank]}"
                axes.annotate(shown, (rank, row), ha="center", va="center", fontsize=8, color=colour)
    axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(ranks), range(1, 1 + ranks))
    axes.set_yticks(range(len(shares)), names)
    axes.set(xlabel="choice")
    return axes
