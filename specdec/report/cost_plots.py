"""Figures of what a round costs and what follows. Need matplotlib; all begin at zero, speedups have a line at 1.0."""

from collections.abc import Mapping, Sequence

from specdec.planning.costs import Costs
from specdec.report.comparison_plots import MARKERS
from specdec.report.intervals import Estimate, spread


def plot_verification_cost(axes, costs: Mapping[str, Costs]):
    """The cost of a target forward against the tokens of each row, a line for each name: a batch size, a drafter."""
    for number, (name, found) in enumerate(costs.items()):
        label = f"{name}: draft step {found.draft:.2f}" if found.draft else name
        axes.plot(found.sizes, found.verify, marker=MARKERS[number % len(MARKERS)], label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of each row", ylabel="forward / plain forward", title="Verification cost")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return axes


def parts_of_round(costs: Costs, levels: float, nodes: float, seconds: float) -> dict[str, float]:
    """Seconds of the parts of a round of `seconds`: forwards of draft and target by themselves, and the rest.

    levels, nodes: of its draft, the root not counted. A captured round may take less than its forwards alone; they then
    share its time.

    >>> parts_of_round(Costs(0.5, 0.5, (1, 3), (1.0, 2.0)), 2, 2, 2.0)
    {'drafting': 0.5, 'verifying': 1.0, 'the rest': 0.5}
    """
    draft = costs.step_seconds * costs.draft * levels
    verify = costs.step_seconds * costs.verify_at(round(nodes) + 1)
    scale = min(1.0, seconds / (draft + verify))
    rest = max(0.0, seconds - draft - verify)
    return {"drafting": scale * draft, "verifying": scale * verify, "the rest": rest}


def plot_round_parts(axes, parts: Mapping[str, Mapping[str, float]]):
    """Where a round's time goes: for each shape the milliseconds of its parts, one on the other."""
    names = list(parts)
    left = [0.0] * len(names)
    for part in dict.fromkeys(part for of in parts.values() for part in of):
        widths = [1000 * parts[name].get(part, 0.0) for name in names]
        axes.barh(range(len(names)), widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="ms a round", title="Where a round's time goes")
    axes.legend(fontsize=7)
    return axes


def plot_speedups_by_length(axes, speedups: Mapping[str, Mapping[int, Estimate]], ylabel: str = "expected speedup"):
    """Speedup against the length of a chain, with intervals, and a star at the best of each line."""
    for number, (label, by_length) in enumerate(speedups.items()):
        lengths = sorted(by_length)
        found = [by_length[length] for length in lengths]
        style = dict(marker=MARKERS[number % len(MARKERS)], capsize=3, label=label)
        line = axes.errorbar(lengths, [one.value for one in found], yerr=spread(found), **style)[0]
        best = max(lengths, key=lambda length: by_length[length].value)
        axes.plot([best], [by_length[best].value], "*", markersize=14, color=line.get_color())
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="draft length γ (star: the best)", ylabel=ylabel, title="Speedup against length")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return axes


def plot_conditional_acceptance(axes, shares: Mapping[str, Sequence[float | None]]):
    """Acceptance at each position, given that the one before was accepted, a line for each kind of prompts."""
    for number, (kind, found) in enumerate(shares.items()):
        known = [(place, share) for place, share in enumerate(found, 1) if share is not None]
        axes.plot(*zip(*known, strict=True) if known else ([], []), marker=MARKERS[number % len(MARKERS)], label=kind)
    axes.set(xlabel="draft position", ylabel="accepted, given the previous was", ylim=(0, 1.02))
    axes.set_title("Acceptance by position and kind")
    axes.legend(fontsize=7)
    return axes
