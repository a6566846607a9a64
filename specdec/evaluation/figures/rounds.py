"""What rounds did, from the runs of a result: how often each choice was right, texts by rounds, and costs."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from specdec.evaluation.figures.series import drafted_of
from specdec.evaluation.methods import OURS
from specdec.evaluation.runs import Run, pooled, said_of
from specdec.planning.costs import Costs
from specdec.report.cost_plots import parts_of_round, plot_round_parts, plot_verification_cost
from specdec.report.text_by_round import lines_of, plot_text_by_round
from specdec.report.tree_plots import plot_choices


def choices_of(runs: Sequence[Run]) -> Iterator[tuple[str, Any]]:
    """A heat map of every method that drafts trees: how often the choice of each rank was right, by depth.

    The depths of a tree of Medusa's are its heads. All temperatures count together. A method that drafted chains alone
    for some text has no heat map: result files keep no ranks of chains, so that these texts would not count."""
    from matplotlib import pyplot

    mine = lambda name: [run.rounds for run in runs if run.method == name and run.rounds]
    whole = {name: stats for name, stats in drafted_of(runs).items() if all(one.ranks for one in mine(name))}
    trees = {name: stats.choice_trials() for name, stats in whole.items()}
    trees = {name: depths for name, depths in trees.items() if any(len(of) > 1 for of in depths)}
    if trees:
        heights = [2 + len(depths) for depths in trees.values()]
        size = (9, 1 + 0.45 * sum(heights))
        figure, grid = pyplot.subplots(
            len(trees), 1, figsize=size, height_ratios=heights, layout="constrained", squeeze=False
        )
        for axes, (name, depths) in zip(grid[:, 0], trees.items(), strict=True):
            shares = [[right / offered if offered else None for right, offered in of] for of in depths]
            counts = [[offered for _, offered in of] for of in depths]
            plot_choices(axes, shares, [f"depth {depth}" for depth in range(1, 1 + len(depths))], counts)
            axes.set_title(name, fontsize=10)
        figure.suptitle("How often each choice is right where it is offered")
        yield "choices", figure


def texts_of(runs: Sequence[Run]) -> Iterator[tuple[str, Any]]:
    """For every kind of prompts the text of each method by rounds, of the runs that kept theirs."""
    from matplotlib import pyplot

    kept = [run for run in runs if run.pieces]
    for kind in dict.fromkeys(run.kind for run in kept):
        of_kind = [run for run in kept if run.kind == kind]
        coolest = min((run.temperature, run.batch) for run in of_kind)
        shown = {run.method: run for run in of_kind if (run.temperature, run.batch) == coolest and run.method != OURS}
        if not shown:
            continue
        lines = [1.5 + lines_of(run.pieces) for run in shown.values()]
        figure, grid = pyplot.subplots(
            len(shown), 1, figsize=(10, 1 + 0.19 * sum(lines)), height_ratios=lines, layout="constrained", squeeze=False
        )
        for axes, (name, run) in zip(grid[:, 0], shown.items(), strict=True):
            tokens = f"{run.new_tokens} tokens in {len(run.pieces)} rounds"
            plot_text_by_round(axes, run.pieces, f"{name}: {tokens}")
        about = "a colour a round, the target's own tokens underlined"
        figure.suptitle(f"Text by rounds ({kind}, {said_of(coolest[0])}): {about}")
        yield f"text_{_plain(kind)}", figure


def costs_of(runs: Sequence[Run], costs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What rounds cost, of a result of `specdec bench`: verification by size, and where a round's time goes.

    costs: by drafter "draft", "sizes" and "verify", in steps of plain decoding."""
    from matplotlib import pyplot

    step = pooled([run for run in runs if run.method == OURS]).round_seconds
    drafted = drafted_of(runs)
    if not costs or step is None:
        return
    found = {name: Costs(step, one["draft"], tuple(one["sizes"]), tuple(one["verify"])) for name, one in costs.items()}
    parts = {OURS: parts_of_round(next(iter(found.values())), 0, 0, step)}
    for name, stats in drafted.items():
        if name in found and stats.round_seconds is not None:
            nodes, levels = (fmean(of[place] for of in stats.uncut) for place in (0, 1))
            parts[name] = parts_of_round(found[name], levels, nodes, stats.round_seconds)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    plot_verification_cost(left, found)
    plot_round_parts(right, parts)
    figure.suptitle("Costs of rounds, one prompt at a time")
    yield "costs", figure


def _plain(name: str) -> str:
    """A name for files."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
