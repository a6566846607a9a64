"""Figures of statistics. Needs matplotlib; each plotting function returns the axes it drew on."""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import quantiles

from specdec.planning.theory import expected_speedup
from specdec.report.stats import RoundStats, wilson_interval
from specdec.trees.plot import plot_tree
from specdec.trees.tree import TokenTree

__all__ = [
    "html_by_round",
    "node_acceptance",
    "plot_acceptance_by_position",
    "plot_comparison",
    "plot_speedup_against_theory",
    "plot_speedup_by_length",
    "plot_speeds",
    "plot_tree",
]


def plot_acceptance_by_position(
    axes, stats: Mapping[str, RoundStats], expected: Mapping[str, float] | None = None, marginal: bool = False
):
    """Acceptance rate at each draft position, with 95% Wilson intervals; one line for each label of `stats`.

    expected: `expected[label]`, the acceptance α that Σ min(p, q) predicts, drawn as a dashed line of the same colour.
    marginal: False: rates given that the previous position was accepted. True: rates among all rounds that proposed the
        position; the theory, the same α at all positions, is then α to the power of the position.
    """
    for offset, (label, rounds) in enumerate(stats.items()):
        positions = range(1, max(rounds.depths, default=0) + 1)
        if marginal:
            tried = [sum(d >= i for d in rounds.depths) for i in positions]
            trials = [(round((s or 0.0) * n), n) for s, n in zip(rounds.marginal_acceptance, tried, strict=True)]
        else:
            trials = [rounds.trials(i) for i in positions]
        shares = [s / n if n else float("nan") for s, n in trials]
        bounds = [wilson_interval(s, n) for s, n in trials]
        spread = [
            [max(0.0, m - low) for m, (low, _) in zip(shares, bounds, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(shares, bounds, strict=True)],
        ]
        line = axes.errorbar(
            [i + 0.06 * offset for i in positions], shares, yerr=spread, marker="o", capsize=3, label=label
        )
        style = dict(color=line[0].get_color(), linestyle="--", linewidth=1)
        if expected and label in expected and marginal:
            theory = [expected[label] ** i for i in positions]
            axes.plot(positions, theory, label=f"{label}: theory, α to the i", **style)
        elif expected and label in expected:
            axes.axhline(expected[label], label=f"{label}: Σ min(p, q) on held-out text", **style)
    axes.set_xticks(range(1, 1 + max((d for rounds in stats.values() for d in rounds.depths), default=1)))
    given = "share of all rounds" if marginal else "given the previous was accepted"
    axes.set(xlabel="draft position", ylabel=f"acceptance, {given}", ylim=(0, 1.02), title="Acceptance per position")
    axes.legend(fontsize=8)
    return axes


def plot_speedup_against_theory(
    axes, points: Sequence[tuple[str, float, float]], length: int, draft_cost: float, verify_cost: float
):
    """Measured `points` (label, α, speedup) and the curve predicted by γ = `length` and the measured costs."""
    alphas = [i / 100 for i in range(101)]
    axes.plot(alphas, [expected_speedup(a, length, draft_cost, verify_cost) for a in alphas], color="grey",
              label=f"theory: γ = {length}, c = {draft_cost:.2f}, v = {verify_cost:.2f}")  # fmt: skip
    for label, alpha, speedup in points:
        axes.plot([alpha], [speedup], "o")
        axes.annotate(label, (alpha, speedup), textcoords="offset points", xytext=(5, -3), fontsize=8)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(
        xlabel="acceptance α per drafted token",
        ylabel="speedup over autoregressive decoding",
        title="Speedup against theory",
        xlim=(0, 1.15),
    )
    axes.legend(fontsize=8)
    return axes


def node_acceptance(tree: TokenTree, stats: RoundStats) -> list[float]:
    """For each node of `tree`, which every round of `stats` drafted: the share of rounds in which it was accepted."""
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
    """Measured and predicted speedup for each draft length γ; a star marks the best of each."""
    for values, style, name in ((measured, "o-", "measured"), (predicted, "--", "predicted")):
        line = axes.plot(list(values), list(values.values()), style, label=f"{name} {label}".strip())[0]
        best = max(values, key=values.__getitem__)
        axes.plot([best], [values[best]], "*", markersize=14, color=line.get_color())
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(
        xlabel="draft length γ",
        ylabel="speedup over autoregressive decoding",
        title="Speedup against draft length (star: the best)",
    )
    axes.legend(fontsize=8)
    return axes


def plot_comparison(axes, values: Mapping[str, Mapping[str, float]], ylabel: str):
    """Grouped bars of `values[method][kind]`: one group for each kind, one colour for each method."""
    kinds = list(dict.fromkeys(kind for by_kind in values.values() for kind in by_kind))
    width = 0.8 / max(1, len(values))
    for number, (method, by_kind) in enumerate(values.items()):
        axes.bar(
            [i + (number - (len(values) - 1) / 2) * width for i in range(len(kinds))],
            [by_kind.get(kind, float("nan")) for kind in kinds],
            width,
            label=method,
        )
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel(ylabel)
    return axes


def plot_speeds(axes, samples: Mapping[str, Sequence[float]], expected: Mapping[str, float] | None = None):
    """Tokens/s of each method: the median of `samples[method]` as a bar, its quartiles as a line.

    expected: `expected[method]`, what the parts of a round allow, as a mark."""
    names = list(samples)
    quartiles = [quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3 for values in samples.values()]
    middles = [middle for _, middle, _ in quartiles]
    spread = [[m - low for low, m, _ in quartiles], [high - m for _, m, high in quartiles]]
    axes.barh(range(len(names)), middles, xerr=spread, capsize=3, color="#8db4d8", label="median and quartiles")
    marks = [(expected[name], place) for place, name in enumerate(names) if expected and name in expected]
    if marks:
        label = "what drafting and verifying cost allows"
        axes.plot(*zip(*marks, strict=True), "D", color="black", markersize=5, linestyle="", label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of a call, prefill included")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2))
    return axes


def html_by_round(tokenizer, tokens: Sequence[int], stats: RoundStats) -> str:
    """The text of a row as HTML, with alternating background from round to round.

    The target's own token, the last of each round, is underlined."""
    pieces, start = [], 0
    for number, emitted in enumerate(stats.emitted):
        drafted, own = tokens[start : start + emitted - 1], tokens[start + emitted - 1 : start + emitted]
        shown = "".join(
            f"<span{style}>{escape(tokenizer.decode(part))}</span>"
            for part, style in ((drafted, ""), (own, ' style="text-decoration: underline"'))
            if len(part)
        )
        pieces.append(
            f'<span style="background: {"#dbe9f6" if number % 2 else "#fde8c9"}; color: black">{shown}</span>'
        )
        start += emitted
    return f'<pre style="white-space: pre-wrap">{"".join(pieces)}</pre>'
