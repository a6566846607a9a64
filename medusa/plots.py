"""Figures of heads, drawn from their accuracies. Needs matplotlib; trees are drawn by `TokenTree.plot`."""

from collections.abc import Sequence

from specdec.report.training_plots import plot_losses
from specdec.report.tree_plots import plot_choices


def plot_accuracies(axes, accuracies: Sequence[Sequence[float]]):
    """A heat map of `HeadRanks.accuracies`, a row for each head, a column for each rank; returns the axes."""
    plot_choices(axes, accuracies, [f"head {head} (token +{head + 2})" for head in range(len(accuracies))])
    axes.set(title="How often each choice of each head is right")
    return axes


def plot_training(axes, records: Sequence[dict], top: int = 1):
    """The validation accuracy of each head over the steps of `train_medusa`'s log; returns the axes.

    `top` is 1, 5 or 10."""
    measured = [record for record in records if f"head_0_top_{top}" in record]
    heads = sum(name.endswith(f"_top_{top}") for name in measured[0]) if measured else 0
    steps = [record["step"] + 1 for record in measured]
    for head in range(heads):
        axes.plot(steps, [record[f"head_{head}_top_{top}"] for record in measured], "o-", label=f"head {head}")
    label = f"top-{top} accuracy on held-out text"
    axes.set(xlabel="step", ylabel=label, ylim=(0, 1), title="What the heads have learned")
    axes.legend(fontsize=8)
    return axes


def plot_loss(axes, records: Sequence[dict]):
    """The losses of `train_medusa`'s log over its steps: the sum that is learned, and each head's; returns the axes."""
    return plot_losses(axes, records, "head")
