"""Figures, drawn from statistics and nothing else. Needs matplotlib; each function returns the axes it drew on."""

from collections.abc import Mapping, Sequence

from specdec.stats import RoundStats, wilson_interval
from specdec.theory import expected_speedup


def plot_acceptance_by_position(axes, stats: Mapping[str, RoundStats], expected: Mapping[str, float] | None = None):
    """α at each draft position, given that the one before was accepted, with 95% Wilson intervals; one line a label of `stats`.

    `expected[label]` draws the acceptance that Σ min(p, q) predicts as a dashed line of the same colour.
    """
    for offset, (label, rounds) in enumerate(stats.items()):
        positions = range(1, max(rounds.proposed, default=0) + 1)
        trials = [rounds.trials(i) for i in positions]
        shares = [s / n if n else float("nan") for s, n in trials]
        bounds = [wilson_interval(s, n) for s, n in trials]
        spread = [
            [max(0.0, m - low) for m, (low, _) in zip(shares, bounds, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(shares, bounds, strict=True)],
        ]
        line = axes.errorbar([i + 0.06 * offset for i in positions], shares, yerr=spread, marker="o", capsize=3, label=label)
        if expected and label in expected:
            axes.axhline(expected[label], color=line[0].get_color(), linestyle="--", linewidth=1, label=f"{label}: Σ min(p, q) on held-out text")
    axes.set_xticks(range(1, 1 + max((p for rounds in stats.values() for p in rounds.proposed), default=1)))
    axes.set(xlabel="draft position", ylabel="acceptance, given the previous was accepted", ylim=(0, 1.02), title="Acceptance per position")
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
