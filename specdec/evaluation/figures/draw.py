"""Draws every figure that a result holds the numbers of, without the machine that measured them. Needs matplotlib."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from specdec.evaluation.figures.audit import figures_of_audit
from specdec.evaluation.figures.comparison import figures_of
from specdec.evaluation.figures.diagnosis import figures_of_diagnosis
from specdec.evaluation.figures.rounds import choices_of, costs_of, texts_of
from specdec.evaluation.figures.series import families_of
from specdec.evaluation.methods import OURS
from specdec.evaluation.reporting import environment_of, runs_of
from specdec.report.comparison_plots import caption, palette

DOTS = 130  # an inch


def draw_result(result: Mapping[str, Any], folder: Path, baseline: str = OURS) -> list[Path]:
    """Draw all figures of a result into `folder` -> the files; the environment stands below each.

    Raises ValueError for a result of a kind without figures."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with palette():
        for name, figure in figures_in(result, baseline):
            made.append(save(figure, folder / f"{name}.png", environment_of(result)))
    return made


def figures_in(result: Mapping[str, Any], baseline: str = OURS) -> Iterator[tuple[str, Any]]:
    """All figures of a result of evaluate, bench, demo, doctor or audit, with their names."""
    if result["kind"] == "audit":
        yield from figures_of_audit(result)
    elif result["kind"] == "doctor":
        yield from figures_of_diagnosis(result)
    else:
        runs = runs_of(result)
        for model in dict.fromkeys(run.model for run in runs):
            mine = [run for run in runs if run.model == model]
            families = families_of(result["settings"], model)
            drawn = figures_of(mine, baseline, families), choices_of(mine), texts_of(mine)
            for name, figure in chain(*drawn, costs_of(mine, _costs_in(result))):
                if model:
                    figure.suptitle(f"{model}: {figure.get_suptitle()}", fontsize=11)
                yield (f"{model}_{name}" if model else name), figure


def save(figure, path: Path, environment: str) -> Path:
    """Write a figure with the environment below it, and close it."""
    from matplotlib import pyplot

    caption(figure, environment)
    figure.savefig(path, dpi=DOTS)
    pyplot.close(figure)
    return path


def _costs_in(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The costs that `specdec bench` measured; other results have none by drafter."""
    return result.get("costs", {}) if result["kind"] == "bench" else {}
