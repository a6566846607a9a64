"""The figures of an evaluation, from its runs alone. Needs matplotlib."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from specdec.evaluation.methods import OURS
from specdec.evaluation.runs import Run, calls, pooled, said_of, throughput
from specdec.evaluation.summary import speedup, tokens_per_round
from specdec.report.comparison_plots import caption, palette, plot_ecdf, plot_losslessness, plot_speedup_by_batch
from specdec.report.intervals import Estimate, share
from specdec.report.plots import plot_acceptance_by_position, plot_comparison
from specdec.report.stats import RoundStats

Draw = Callable[..., None]


def draw_all(runs: Sequence[Run], folder: Path, environment: str, baseline: str = OURS) -> list[Path]:
    """Draw every figure that the runs allow into `folder` -> the files; `environment` goes below each."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for model in dict.fromkeys(run.model for run in runs):
        mine = [run for run in runs if run.model == model]
        with palette():
            for name, figure in _figures(mine, baseline):
                figure.suptitle(f"{model}: {figure.get_suptitle()}" if model else figure.get_suptitle(), fontsize=11)
                caption(figure, environment)
                made.append(folder / f"{model}_{name}.png" if model else folder / f"{name}.png")
                figure.savefig(made[-1], dpi=130)
                pyplot.close(figure)
    return made


def draw_audit(result: Mapping[str, Any], folder: Path, environment: str) -> list[Path]:
    """Draw the p-values of an audit's samples and of its control -> the file, if there were samples."""
    from matplotlib import pyplot

    found: dict[str, list[float]] = {}
    for one in result["records"]:
        if "p_value" in one:
            found.setdefault(one["part"], []).append(one["p_value"])
    if not found:
        return []
    (level,) = [one["level_of_each"] for one in result["methods"] if one["name"] == "sampled"]
    folder.mkdir(parents=True, exist_ok=True)
    with palette():
        figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
        plot_losslessness(axes, found, level)
        caption(figure, environment)
        figure.savefig(folder / "losslessness.png", dpi=130)
        pyplot.close(figure)
    return [folder / "losslessness.png"]


def _figures(runs: Sequence[Run], baseline: str) -> Iterator[tuple[str, Any]]:
    temperatures = sorted({run.temperature for run in runs})
    least = min(run.batch for run in runs)
    alone = [run for run in runs if run.batch == least]
    at = lambda some, temperature: [run for run in some if run.temperature == temperature]
    panels = [(said_of(temperature), at(alone, temperature)) for temperature in temperatures]
    estimates = {
        "speedup_by_task": ("Speedup", f"over {baseline}", _speedup),
        "tokens_by_task": ("Tokens per round", "tokens", _tokens),
    }
    for name, (title, ylabel, estimate) in estimates.items():
        values = [(said, _by_task(some, baseline, estimate)) for said, some in panels]
        yield (
            name,
            _grid(values, partial(_bars, ylabel=ylabel), f"{title}, batch {least}"),
        )
    drafted = [(said, _drafted(some)) for said, some in panels]
    if any(found for _, found in drafted):
        for name, marginal in (("acceptance_conditional", False), ("acceptance_marginal", True)):
            draw = lambda axes, found, marginal=marginal: plot_acceptance_by_position(
                axes, found, {label: a for label, stats in found.items() if (a := _alpha(stats)) is not None}, marginal
            )
            yield name, _grid(drafted, draw, "Acceptance by position", legend=False)
    ratios = [(said, _ratios(some, baseline)) for said, some in panels]
    yield "ecdf", _grid(ratios, plot_ecdf, f"Speedup by prompt, batch {least}")
    if len({run.batch for run in runs}) > 1:
        by_batch = [(said_of(t), _by_batch(at(runs, t), baseline)) for t in temperatures]
        yield "speedup_by_batch", _grid(by_batch, plot_speedup_by_batch, "Speedup against batch size")


def _grid(panels: Sequence[tuple[str, dict]], draw: Draw, title: str, legend: bool = True):
    """A figure with a panel for each temperature, and one legend below."""
    from matplotlib import pyplot

    width = 5.5 * len(panels) + 2.5
    figure, grid = pyplot.subplots(1, len(panels), figsize=(width, 5), layout="constrained", squeeze=False)
    for axes, (said, found) in zip(grid[0], panels, strict=True):
        draw(axes, found)
        axes.set_title(said, fontsize=10)
    figure.suptitle(title)
    handles = {name: handle for axes in grid[0] for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if legend and handles:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    return figure


def _bars(axes, values: dict, ylabel: str) -> None:
    plot_comparison(axes, values, "", ylabel)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)


def _speedup(mine: Sequence[Run], plain: Sequence[Run]) -> Estimate:
    """Without an interval, a bar alone, where there are too few prompts."""
    value = throughput(mine) / throughput(plain)
    return speedup(mine, plain) or Estimate(value, value, value)


def _tokens(mine: Sequence[Run], plain: Sequence[Run]) -> Estimate | None:
    value = pooled(mine).tokens_per_round
    return None if value is None else tokens_per_round(mine) or Estimate(value, value, value)


def _by_task(runs: Sequence[Run], baseline: str, estimate: Callable) -> dict[str, dict[str, Estimate | None]]:
    """Estimates by method and by task, of a task with several kinds by kind; None where there are too few prompts."""
    several = len({run.task for run in runs}) > 1
    label = lambda run: f"{run.task}\n{run.kind}" if several else run.kind
    found: dict[str, dict[str, Estimate | None]] = {}
    for method in _shown(runs, baseline):
        for name in dict.fromkeys(map(label, runs)):
            here = [run for run in runs if label(run) == name]
            mine, plain = ([run for run in here if run.method == one] for one in (method, baseline))
            found.setdefault(method, {})[name] = estimate(mine, plain) if mine and plain else None
    return {method: of for method, of in found.items() if any(of.values())}


def _by_batch(runs: Sequence[Run], baseline: str) -> dict[str, dict[int, Estimate]]:
    found: dict[str, dict[int, Estimate]] = {}
    for method in _shown(runs, baseline):
        for batch in sorted({run.batch for run in runs}):
            mine, plain = (
                [run for run in runs if (run.method, run.batch) == (one, batch)] for one in (method, baseline)
            )
            if mine and plain:
                found.setdefault(method, {})[batch] = _speedup(mine, plain)
    return found


def _ratios(runs: Sequence[Run], baseline: str) -> dict[str, list[float]]:
    """Of each method the speedup of every prompt, all its repeats and turns together."""
    found = {}
    for method in _shown(runs, baseline):
        sums = []
        for name in (method, baseline):
            of_method = [run for run in runs if run.method == name]
            of_calls, clusters = calls(of_method), {run.call: run.cluster for run in of_method}
            key = lambda call, clusters=clusters: repr(clusters[call])
            sums.append({
                cluster: [sum(part) for part in zip(*(of_calls[call] for call in group), strict=True)]
                for cluster, group in groupby(sorted(of_calls, key=key), key)
            })  # fmt: skip
        mine, plain = sums
        found[method] = [n / s / (plain[one][0] / plain[one][1]) for one, (n, s) in mine.items() if one in plain]
    return found


def _drafted(runs: Sequence[Run]) -> dict[str, RoundStats]:
    found = {name: pooled([run for run in runs if run.method == name]) for name in _shown(runs, OURS)}
    return {name: stats for name, stats in found.items() if sum(stats.proposed)}


def _alpha(stats: RoundStats) -> float | None:
    """Accepted among the tokens that were tested, as if all positions were alike."""
    tried = [stats.trials(i) for i in range(1, max(stats.depths, default=0) + 1)]
    found = share(sum(s for s, _ in tried), sum(n for _, n in tried))
    return None if found is None else found.value


def _shown(runs: Sequence[Run], baseline: str) -> list[str]:
    """The methods, without the baseline; those without rounds come last, so that colours are the same everywhere."""
    names = dict.fromkeys(run.method for run in runs if run.method != baseline)
    drafted = {run.method for run in runs if run.rounds}
    return sorted(names, key=lambda name: (name == OURS, name not in drafted))
