"""Figures of a training's log, a list of records by step."""

from collections.abc import Callable, Sequence
from pathlib import Path

from specdec.report.headless import headless_pyplot


def draw_training(folder: Path, records: Sequence[dict], plots: Sequence[Callable]) -> Path | None:
    """`plots`, functions of axes and `records`, side by side in training.png; None without matplotlib."""
    pyplot = headless_pyplot()
    if pyplot is None:
        return None
    figure, axes = pyplot.subplots(1, len(plots), figsize=(14, 4), layout="constrained")
    for plot, one in zip(plots, axes, strict=True):
        plot(one, records)
    figure.savefig(folder / "training.png", dpi=120)
    pyplot.close(figure)
    return folder / "training.png"


def plot_losses(axes, records: Sequence[dict], part: str):
    """The loss that is minimised, and those of its parts "`part`_0_loss", "`part`_1_loss" …; returns the axes."""
    steps = [record["step"] + 1 for record in records]
    axes.plot(steps, [record["loss"] for record in records], color="black", label="all, weighted")
    parts = sum(name.startswith(f"{part}_") and name.endswith("_loss") for name in records[0]) if records else 0
    for number in range(parts):
        values = [record[f"{part}_{number}_loss"] for record in records]
        axes.plot(steps, values, linewidth=1, label=f"{part} {number}")
    axes.set(xlabel="step", ylabel="loss", title="Loss on the training data")
    axes.legend(fontsize=8)
    return axes


def plot_speed(axes, records: Sequence[dict]):
    """The tokens that were taken a second, over all processes, over the steps; returns the axes."""
    axes.plot([record["step"] + 1 for record in records], [record["tokens_per_second"] for record in records], "o-")
    axes.set(xlabel="step", ylabel="tokens/s", title="Speed of the training")
    axes.set_ylim(0, 1.1 * max(record["tokens_per_second"] for record in records))
    return axes


def plot_acceptance(axes, records: Sequence[dict]):
    """The acceptance length that was measured at validations, over the steps; returns the axes."""
    measured = [record for record in records if "tokens_per_round" in record]
    axes.plot([record["step"] + 1 for record in measured], [record["tokens_per_round"] for record in measured], "o-")
    axes.set(xlabel="step", ylabel="tokens a round on held-out prompts", title="Acceptance length")
    axes.set_ylim(bottom=1)
    return axes
