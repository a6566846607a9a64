"""The picture of a token tree, for `TokenTree.plot` and `specdec.report.plots`. Needs matplotlib."""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from specdec.trees.tree import TokenTree

SMALLEST, GAP = 130, 4  # area of a circle around two digits, in points squared; points between neighbours
LEFT = 0.58  # the tree's share of the width, unless it needs more


def plot_tree(tree: TokenTree, expected: Sequence[float] | None = None, measured: Sequence[float] | None = None,
              labels: Sequence[str] | None = None):  # fmt: skip
    """Draw a `TokenTree` beside the mask that its verification uses; returns the figure.

    expected: per node its size, the probability that it is accepted (`specdec.planning.theory.reach`).
    measured: per node its colour, the share of the rounds in which it was accepted.
    labels: per node its name, for instance its token.
    Raises ValueError for one of them that has not one entry per node."""
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    for name, values in (("expected", expected), ("measured", measured), ("labels", labels)):
        if values is not None and len(values) != tree.size:
            raise ValueError(f"{name} needs one entry for each of {tree.size} nodes, got {len(values)}")
    names = [str(node) for node in range(tree.size)] if labels is None else list(labels)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(LEFT, 1 - LEFT)
    )
    places = _places(tree)
    for node, parent in enumerate(tree.above[1:], 1):
        (x, y), (u, v) = places[parent], places[node]
        left.plot([x, u], [y, v], color="lightgrey", linewidth=1, zorder=1)
    scale = ScalarMappable(Normalize(0, 1), "viridis")
    colours = ["lightsteelblue"] * tree.size if measured is None else scale.to_rgba(np.array(measured, dtype=float))
    for node, (x, y) in enumerate(places):
        size = 320 if expected is None else SMALLEST + 500 * expected[node]
        left.scatter([x], [y], s=size, color=[colours[node]], edgecolors="grey", zorder=2)
        ink = "white" if measured is not None and measured[node] < 0.6 else "black"  # viridis is dark below
        left.annotate(names[node], (x, y), ha="center", va="center", fontsize=7, zorder=3, color=ink)
    if measured is not None:
        figure.colorbar(scale, ax=left, label="share of rounds in which it was accepted", shrink=0.7)
    left.set(yticks=range(0, -tree.max_depth - 1, -1), yticklabels=range(tree.max_depth + 1), xticks=[], ylabel="depth")
    left.set_title(f"{tree.size} nodes" + ("" if expected is None else ", sized by expected acceptance"))
    left.margins(0.1)
    for side in ("top", "right", "bottom"):
        left.spines[side].set_visible(False)
    nodes = range(tree.size)
    plot_mask(right, [[other == 0 or other in tree.path(node) for other in nodes] for node in nodes])
    right.set_title("which nodes (columns) each node (row) sees")
    ticks = nodes if tree.size <= 32 else range(0, tree.size, 8)
    right.set_xticks(ticks, [names[i] for i in ticks], fontsize=7, rotation=90)
    right.set_yticks(ticks, [names[i] for i in ticks], fontsize=7)
    _widen(figure, left)
    return figure


def plot_mask(axes, visible, **options):
    """Blue where a query (row) sees a key (column) of `visible` `[queries, keys]`; returns the axes.

    `options` are those of `imshow`."""
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.6, interpolation="none", **options)
    return axes


def _widen(figure, left) -> None:
    """Give the tree as much width as its neighbouring labels and circles, one unit of x apart, need side by side."""
    mask = figure.get_figwidth() * (1 - LEFT)
    for _ in range(3):  # the layout also changes what lies beside the axes
        figure.draw_without_rendering()
        labels = [text.get_window_extent().width * 72 / figure.dpi for text in left.texts]
        circles = [sqrt(dots.get_sizes()[0]) for dots in left.collections]
        needed = (max([*labels[1:], *circles[1:]], default=0) + GAP) / 72  # inches; beside the root is no node
        (start, _), (end, _) = figure.dpi_scale_trans.inverted().transform(left.transData.transform([(0, 0), (1, 0)]))
        if needed <= end - start:
            return
        width = left.bbox.width / figure.dpi
        figure.set_figwidth(figure.get_figwidth() + width * (needed / (end - start) - 1) + GAP / 72)
        left.get_gridspec().set_width_ratios((figure.get_figwidth() - mask, mask))


def _places(tree: TokenTree) -> list[tuple[float, float]]:
    """Where to draw each node: leaves side by side, every other node above the middle of its children."""
    x = [0.0] * tree.size
    order = [0]
    for node in order:  # grows as it is walked
        order += tree.children[node]
    leaves: list[int] = []
    waiting = [0]
    while waiting:
        node = waiting.pop()
        waiting += reversed(tree.children[node])
        leaves += [] if tree.children[node] else [node]
    for place, leaf in enumerate(leaves):
        x[leaf] = float(place)
    for node in reversed(order):
        if tree.children[node]:
            x[node] = (x[tree.children[node][0]] + x[tree.children[node][-1]]) / 2
    return [(x[node], -float(tree.depths[node])) for node in range(tree.size)]
