"""Figures of statistics. Needs matplotlib; a function with `axes` draws on them and returns them, others make a figure.

Intervals are drawn wherever there are measured values; legends lie below the axes, where they cover nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill

from specdec.planning.theory import expected_speedup
from specdec.report import intervals
from specdec.report.intervals import Estimate, spread
from specdec.report.labels import label_points
from specdec.report.stats import RoundStats, wilson_interval
from specdec.report.text_by_round import BACKGROUNDS, pieces_by_round
from specdec.trees.plot import plot_tree
from specdec.trees.tree import TokenTree

__all__ = [
    "SpeedupPoint",
    "html_by_round",
    "node_acceptance",
    "plot_acceptance_by_position",
    "plot_comparison",
    "plot_methods",
    "plot_speedup_against_theory",
    "plot_speedup_by_length",
    "plot_speeds",
    "plot_tree",
]

LINE = 13  # points (1/72 inch) from one line of small text to the next
BELOW = 36  # points from the axes down to where ticks and label end


@dataclass(frozen=True, slots=True)
class SpeedupPoint:
    """A measured speedup at a measured acceptance α per drafted token, each with its interval."""

    label: str
    alpha: Estimate
    speedup: Estimate


def plot_acceptance_by_position(
    axes, stats: Mapping[str, RoundStats], expected: Mapping[str, float] | None = None, marginal: bool = False,
    alpha: str = "Σ min(p, q) on held-out text",
):  # fmt: skip
    """Acceptance rate at each draft position, with 95% Wilson intervals; one line for each label of `stats`.

    expected: `expected[label]`, the acceptance α of a theory, drawn as a dashed line of the same colour.
    alpha: what that α is, for the legend.
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
        bars = [
            [max(0.0, m - low) for m, (low, _) in zip(shares, bounds, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(shares, bounds, strict=True)],
        ]
        line = axes.errorbar(
            [i + 0.06 * offset for i in positions], shares, yerr=bars, marker="o", capsize=3, label=label
        )
        style = dict(color=line[0].get_color(), linestyle="--", linewidth=1)
        if expected and label in expected and marginal:
            theory = [expected[label] ** i for i in positions]
            axes.plot(positions, theory, label=f"{label}: theory, α to the i", **style)
        elif expected and label in expected:
            axes.axhline(expected[label], label=f"{label}: {alpha}", **style)
    axes.set_xticks(range(1, 1 + max((d for rounds in stats.values() for d in rounds.depths), default=1)))
    given = "share of all rounds" if marginal else "given the previous was accepted"
    axes.set(xlabel="draft position", ylabel=f"acceptance, {given}", ylim=(0, 1.02))
    axes.set_title("Acceptance per position, 95% intervals")
    _legend_below(axes)
    return axes


def plot_speedup_against_theory(
    axes, points: Sequence[SpeedupPoint], length: int, draft_cost: float, verify_cost: float, note: str = ""
):
    """Measured `points` and the curve that γ = `length` and the measured costs predict; `note` is written below.

    Labels are placed for the figure as it is: draw the figure's other axes first."""
    alphas = [i / 100 for i in range(101)]
    axes.plot(alphas, [expected_speedup(a, length, draft_cost, verify_cost) for a in alphas], color="grey",
              label=f"theory: γ = {length}, c = {draft_cost:.2f}, v = {verify_cost:.2f}")  # fmt: skip
    colours = []
    for alpha, speedup in ((point.alpha, point.speedup) for point in points):
        drawn = axes.errorbar([alpha.value], [speedup.value], xerr=spread([alpha]), yerr=spread([speedup]), fmt="o",
                              elinewidth=0.8)  # fmt: skip
        colours.append(drawn[0].get_color())
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(
        xlabel="acceptance α per drafted token",
        ylabel="speedup over autoregressive decoding",
        title="Speedup against theory",
        xlim=(0, 1.02),
    )
    _legend_below(axes)
    if note:
        axes.annotate(fill(note, 100), (0.5, 0), xycoords="axes fraction", xytext=(0, -BELOW - 1.6 * LINE),
                      textcoords="offset points", ha="center", va="top", fontsize=8)  # fmt: skip
    places = [(point.alpha.value, point.speedup.value) for point in points]
    label_points(axes, places, [point.label for point in points], colours)
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


def plot_speedup_by_length(axes, measured: Mapping[int, Estimate], predicted: Mapping[int, float], label: str = ""):
    """Measured and predicted speedup for each draft length γ; a star marks the best of each."""
    values = {length: estimate.value for length, estimate in measured.items()}
    bars = axes.errorbar(list(values), list(values.values()), yerr=spread(list(measured.values())), marker="o",
                         capsize=3, label=f"measured {label}".strip())  # fmt: skip
    line = axes.plot(list(predicted), list(predicted.values()), "--", label=f"predicted {label}".strip())[0]
    for drawn, found in ((bars[0], values), (line, predicted)):
        best = max(found, key=found.__getitem__)
        axes.plot([best], [found[best]], "*", markersize=14, color=drawn.get_color())
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xlabel="draft length γ", ylabel="speedup over autoregressive decoding")
    axes.set_title("Speedup against draft length (star: the best)")
    _legend_below(axes)
    return axes


def plot_comparison(axes, values: Mapping[str, Mapping[str, Estimate | None]], title: str, ylabel: str = ""):
    """Grouped bars of `values[method][kind]` with their intervals: a group for each kind, a colour for each method.

    A method without a value for a kind (absent or None) has no bar there. The caller draws the legend, outside."""
    kinds = list(dict.fromkeys(kind for by_kind in values.values() for kind in by_kind))
    width = 0.8 / max(1, len(values))
    for number, (method, by_kind) in enumerate(values.items()):
        found = [by_kind.get(kind) for kind in kinds]
        places = [i + (number - (len(values) - 1) / 2) * width for i in range(len(kinds))]
        heights = [float("nan") if one is None else one.value for one in found]
        axes.bar(places, heights, width, yerr=spread(found), error_kw=dict(elinewidth=0.8), label=method)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(title=title, ylabel=ylabel)
    return axes


def plot_speeds(axes, samples: Mapping[str, Sequence[float]], expected: Mapping[str, float] | None = None):
    """Tokens/s of each method: the median of `samples[method]` as a bar, its quartiles as a line.

    expected: `expected[method]`, what the parts of a round allow, as a mark."""
    names = list(samples)
    found = [intervals.median(values) for values in samples.values()]
    style = dict(capsize=3, color="#8db4d8", label="median and quartiles over calls")
    axes.barh(range(len(names)), [one.value for one in found], xerr=spread(found), **style)
    marks = [(expected[name], place) for place, name in enumerate(names) if expected and name in expected]
    if marks:
        label = "what drafting and verifying cost allows"
        axes.plot(*zip(*marks, strict=True), "D", color="black", markersize=5, linestyle="", label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of a call, prefill included")
    _legend_below(axes, 1)
    return axes


def plot_methods(stats: Mapping[str, Mapping[str, RoundStats]], plain: Mapping[str, RoundStats]):
    """Four panels of `stats[method][kind]`: tokens per round, acceptance rate, overhead and speedup, 95% intervals.

    `plain[kind]` are the rounds without a draft of the same prompts, the unit of overhead and speedup; returns the
    figure, whose legend lies below the panels."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    panels = {
        ("Tokens per round", "tokens"): lambda rounds, kind: intervals.tokens_per_round(rounds),
        ("Acceptance rate", "accepted / proposed tokens"): lambda rounds, kind: intervals.acceptance_rate(rounds),
        ("Overhead", "round / plain step"): lambda rounds, kind: intervals.overhead(rounds, plain[kind]),
        ("Speedup", "over plain decoding"): lambda rounds, kind: intervals.speedup(rounds, plain[kind]),
    }
    for ax, ((title, ylabel), estimate) in zip(axes.flat, panels.items(), strict=True):
        found = {name: {kind: estimate(rounds, kind) for kind, rounds in of.items()} for name, of in stats.items()}
        plot_comparison(ax, found, title, ylabel)
        ax.set_ylim(bottom=0)
    axes[1, 1].axhline(1, color="black", linewidth=0.5)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
    return figure


def _legend_below(axes, columns: int = 2) -> None:
    """A legend under the label of the x axis, where it covers neither bars nor points."""
    from matplotlib.transforms import ScaledTranslation

    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    shift = ScaledTranslation(0, -BELOW / 72, axes.figure.dpi_scale_trans)
    axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=axes.transAxes + shift,
                ncols=columns, fontsize=8, borderaxespad=0)  # fmt: skip


def html_by_round(tokenizer, tokens: Sequence[int], stats: RoundStats) -> str:
    """The text of a row as HTML, with alternating background from round to round.

    The target's own token, the last of each round, is underlined."""
    pieces = []
    for number, parts in enumerate(pieces_by_round(tokenizer, tokens, stats)):
        shown = "".join(
            f"<span{style}>{escape(part)}</span>"
            for part, style in zip(parts, ("", ' style="text-decoration: underline"'), strict=True)
            if part
        )
        pieces.append(f'<span style="background: {BACKGROUNDS[number % 2]}; color: black">{shown}</span>')
    return f'<pre style="white-space: pre-wrap">{"".join(pieces)}</pre>'
