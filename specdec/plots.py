"""Figures, drawn from statistics and nothing else. Needs matplotlib; each function returns the axes it drew on."""

from collections.abc import Mapping, Sequence
from html import escape

from specdec.stats import RoundStats, wilson_interval
from specdec.theory import expected_speedup
from specdec.tree import TokenTree


def plot_acceptance_by_position(axes, stats: Mapping[str, RoundStats], expected: Mapping[str, float] | None = None, marginal: bool = False):
    """α at each draft position, given that the one before was accepted, with 95% Wilson intervals; one line a label of `stats`.

    `expected[label]` draws the acceptance that Σ min(p, q) predicts as a dashed line of the same colour. `marginal`: the share of all
    rounds that proposed a position instead; theory, acceptance alike at all positions, then has α to the power of the position.
    """
    for offset, (label, rounds) in enumerate(stats.items()):
        positions = range(1, max(rounds.depths, default=0) + 1)
        if marginal:
            shares = rounds.marginal_acceptance
            tried = [sum(d >= i for d in rounds.depths) for i in positions]
            trials = [(round(share * n), n) for share, n in zip(shares, tried, strict=True)]
        else:
            trials = [rounds.trials(i) for i in positions]
        shares = [s / n if n else float("nan") for s, n in trials]
        bounds = [wilson_interval(s, n) for s, n in trials]
        spread = [
            [max(0.0, m - low) for m, (low, _) in zip(shares, bounds, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(shares, bounds, strict=True)],
        ]
        line = axes.errorbar([i + 0.06 * offset for i in positions], shares, yerr=spread, marker="o", capsize=3, label=label)
        if expected and label in expected and marginal:
            axes.plot(positions, [expected[label] ** i for i in positions], "--", color=line[0].get_color(), linewidth=1, label=f"{label}: theory, α to the i")
        elif expected and label in expected:
            axes.axhline(expected[label], color=line[0].get_color(), linestyle="--", linewidth=1, label=f"{label}: Σ min(p, q) on held-out text")
    axes.set_xticks(range(1, 1 + max((d for rounds in stats.values() for d in rounds.depths), default=1)))
    given = "share of all rounds" if marginal else "given the previous was accepted"
    axes.set(xlabel="draft position", ylabel=f"acceptance, {given}", ylim=(0, 1.02), title="Acceptance per position")
    axes.legend(fontsize=8)
    return axes


def plot_speedup_against_theory(axes, points: Sequence[tuple[str, float, float]], length: int, draft_cost: float, verify_cost: float):
    """Measured speedups `(label, α, speedup)` beside the curve that α, γ = `length` and the measured costs predict."""
    alphas = [i / 100 for i in range(101)]
    axes.plot(alphas, [expected_speedup(a, length, draft_cost, verify_cost) for a in alphas], color="grey",
              label=f"theory: γ = {length}, c = {draft_cost:.2f}, v = {verify_cost:.2f}")  # fmt: skip
    for label, alpha, speedup in points:
        axes.plot([alpha], [speedup], "o")
        axes.annotate(label, (alpha, speedup), textcoords="offset points", xytext=(5, -3), fontsize=8)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xlabel="acceptance α per drafted token", ylabel="speedup over autoregressive decoding", title="Speedup against theory", xlim=(0, 1.15))
    axes.legend(fontsize=8)
    return axes


def plot_tree(tree: TokenTree, expected: Sequence[float] | None = None, measured: Sequence[float] | None = None, labels: Sequence[str] | None = None):
    """Draw a token tree beside the mask that its verification uses; returns the figure.

    Per node: `expected` sizes it (`specdec.theory.reach`), `measured`, its share of the rounds in which it was accepted, colours it, and
    `labels`, for instance tokens, name it. Raises ValueError where one of them has not one entry a node.
    """
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    for name, values in (("expected", expected), ("measured", measured), ("labels", labels)):
        if values is not None and len(values) != tree.size:
            raise ValueError(f"{name} needs one entry for each of {tree.size} nodes, got {len(values)}")
    names = [str(node) for node in range(tree.size)] if labels is None else list(labels)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(1.4, 1))
    places = _places(tree)
    for node, parent in enumerate(tree.parents[1:], 1):
        (x, y), (u, v) = places[parent], places[node]
        left.plot([x, u], [y, v], color="lightgrey", linewidth=1, zorder=1)
    colours = ScalarMappable(Normalize(0, 1), "viridis")
    for node, (x, y) in enumerate(places):
        size = 320 if expected is None else 60 + 540 * expected[node]
        colour = "lightsteelblue" if measured is None else colours.to_rgba(measured[node])
        left.scatter([x], [y], s=size, color=[colour], edgecolors="grey", zorder=2)
        left.annotate(names[node], (x, y), ha="center", va="center", fontsize=7, zorder=3)
    if measured is not None:
        figure.colorbar(colours, ax=left, label="share of rounds in which it was accepted", shrink=0.7)
    left.set(yticks=range(0, -tree.max_depth - 1, -1), yticklabels=range(tree.max_depth + 1), xticks=[], ylabel="depth")
    left.set_title(f"{tree.size} nodes" + ("" if expected is None else ", sized by expected acceptance"))
    left.margins(0.1)
    for side in ("top", "right", "bottom"):
        left.spines[side].set_visible(False)
    sees = [[other == 0 or other in tree.path(node) or other == node for other in range(tree.size)] for node in range(tree.size)]
    right.imshow(sees, cmap="Blues", vmin=0, vmax=1.6)
    right.set(title="which nodes (columns) each node (row) sees")
    ticks = range(tree.size) if tree.size <= 32 else range(0, tree.size, 8)
    right.set_xticks(ticks, [names[i] for i in ticks], fontsize=7, rotation=90)
    right.set_yticks(ticks, [names[i] for i in ticks], fontsize=7)
    return figure


def _places(tree: TokenTree) -> list[tuple[float, float]]:
    """Leaves side by side, every other node above the middle of its children."""
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


def node_acceptance(tree: TokenTree, stats: RoundStats) -> list[float]:
    """Per node of `tree`, drafted in every round of `stats`: its share of the rounds in which it was accepted."""
    counts = [0] * tree.size
    for passed in stats.ranks:
        node = 0
        counts[0] += 1
        for _, rank in passed:
            if rank is None:
                break
            node = tree.children[node][rank]
            counts[node] += 1
    return [count / max(1, counts[0]) for count in counts]


def plot_speedup_by_length(axes, measured: Mapping[int, float], predicted: Mapping[int, float], label: str = ""):
    """Speedup at each draft length γ, measured beside predicted; a star marks the best of each."""
    for values, style, name in ((measured, "o-", "measured"), (predicted, "--", "predicted")):
        line = axes.plot(list(values), list(values.values()), style, label=f"{name} {label}".strip())[0]
        best = max(values, key=values.__getitem__)
        axes.plot([best], [values[best]], "*", markersize=14, color=line.get_color())
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xlabel="draft length γ", ylabel="speedup over autoregressive decoding", title="Speedup against draft length (star: the best)")
    axes.legend(fontsize=8)
    return axes


def plot_comparison(axes, values: Mapping[str, Mapping[str, float]], ylabel: str):
    """Grouped bars: `values[method][kind]`, one group a kind and one colour a method."""
    kinds = list(dict.fromkeys(kind for by_kind in values.values() for kind in by_kind))
    width = 0.8 / max(1, len(values))
    for number, (method, by_kind) in enumerate(values.items()):
        axes.bar(
            [i + (number - (len(values) - 1) / 2) * width for i in range(len(kinds))], [by_kind.get(kind, float("nan")) for kind in kinds], width, label=method
        )
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel(ylabel)
    return axes


def html_by_round(tokenizer, tokens: Sequence[int], stats: RoundStats) -> str:
    """The text of a row as HTML, its background alternating from round to round; the target's own token, each round's last, is underlined."""
    pieces, start = [], 0
    for number, emitted in enumerate(stats.emitted):
        drafted, own = tokens[start : start + emitted - 1], tokens[start + emitted - 1 : start + emitted]
        shown = "".join(
            f"<span{style}>{escape(tokenizer.decode(part))}</span>"
            for part, style in ((drafted, ""), (own, ' style="text-decoration: underline"'))
            if len(part)
        )
        pieces.append(f'<span style="background: {"#dbe9f6" if number % 2 else "#fde8c9"}; color: black">{shown}</span>')
        start += emitted
    return f'<pre style="white-space: pre-wrap">{"".join(pieces)}</pre>'
