"""Methods side by side: the figures of an evaluation, from its runs alone. Needs matplotlib."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from specdec.evaluation.figures.series import (
    alpha_of,
    by_batch,
    by_budget,
    by_length,
    by_task,
    drafted_of,
    ratios_of,
    speedup_of,
    tokens_of,
)
from specdec.evaluation.runs import Run, said_of
from specdec.report.comparison_plots import plot_beside_one, plot_ecdf, plot_speedup_by_batch
from specdec.report.cost_plots import plot_speedups_by_length
from specdec.report.intervals import Estimate
from specdec.report.plots import plot_acceptance_by_position
from specdec.report.stats import RoundStats
from specdec.report.tree_plots import plot_tokens_by_budget

Draw = Callable[..., Any]


def figures_of(runs: Sequence[Run], baseline: str, families: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Each figure that the runs of one model allow, with its name.

    families: of methods, what they have in common but for the size of their drafts, see `families_of`."""
    temperatures = sorted({run.temperature for run in runs})
    least = min(run.batch for run in runs)
    alone = [run for run in runs if run.batch == least]
    at = lambda some, temperature: [run for run in some if run.temperature == temperature]
    panels = [(said_of(temperature), at(alone, temperature)) for temperature in temperatures]
    estimates: dict[str, tuple[str, str, Callable[..., Any]]] = {
        "speedup_by_task": ("Speedup", f"over {baseline}", speedup_of),
        "tokens_by_task": ("Tokens per round", "tokens", tokens_of),
    }
    for name, (title, ylabel, estimate) in estimates.items():
        values = [(said, by_task(some, baseline, estimate)) for said, some in panels]
        yield name, _grid(values, partial(plot_beside_one, ylabel=ylabel), f"{title}, batch {least}")
    drafted = [(said, drafted_of(some)) for said, some in panels]
    if any(found for _, found in drafted):
        for name, marginal in (("acceptance_conditional", False), ("acceptance_marginal", True)):
            draw = partial(_acceptance, marginal=marginal)
            yield name, _grid(drafted, draw, "Acceptance by position", below=max(len(found) for _, found in drafted))
    ratios = [(said, ratios_of(some, baseline)) for said, some in panels]
    yield "ecdf", _grid(ratios, plot_ecdf, f"Speedup by prompt, batch {least}")
    if len({run.batch for run in runs}) > 1:
        over_batches = [(said_of(t), by_batch(at(runs, t), baseline)) for t in temperatures]
        yield "speedup_by_batch", _grid(over_batches, plot_speedup_by_batch, "Speedup against batch size")
    lengths = [(said, by_length(some, baseline, families)) for said, some in panels]
    if any(found for _, found in lengths):
        of_lengths = partial(plot_speedups_by_length, ylabel=f"speedup over {baseline}")
        yield "speedup_by_length", _grid(lengths, of_lengths, f"Speedup against draft length, batch {least}")
    budgets = [(said, by_budget(some, families)) for said, some in panels]
    if any(found for _, found in budgets):
        yield "tokens_by_budget", _grid(budgets, _budgets, f"Tokens per round against nodes, batch {least}")


def _acceptance(axes, found: Mapping[str, RoundStats], marginal: bool) -> None:
    """With the theory: one acceptance at all positions, that of all tokens that were tested."""
    alphas = {name: alpha for name, stats in found.items() if (alpha := alpha_of(stats)) is not None}
    plot_acceptance_by_position(axes, found, alphas, marginal, "theory, one α at all positions")


def _budgets(axes, found: Mapping[str, Mapping[float, Estimate | None]]) -> None:
    plot_tokens_by_budget(axes, {}, found)


def _grid(panels: Sequence[tuple[str, dict]], draw: Draw, title: str, below: int = 0):
    """A figure with a panel for each temperature, and one legend beside them.

    below: lines of legends that the panels have below them, instead."""
    from matplotlib import pyplot

    size = (5.5 * len(panels) + 2.5, 5 + 0.18 * below)
    figure, grid = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (said, found) in zip(grid[0], panels, strict=True):
        draw(axes, found)
        axes.set_title(said, fontsize=10)
        if not below and axes.get_legend() is not None:
            axes.get_legend().remove()
    figure.suptitle(title)
    handles = {name: handle for axes in grid[0] for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles and not below:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    return figure
