"""What the training loop asks of a drafter that learns: its settings, its labels, its gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from specdec.training.backbone import Backbone
from specdec.training.data import Rows


class LoopSettings(Protocol):
    """The settings that the loop reads: `steps` of `batch` rows over all processes, `rows_at_once` in a forward.

    All fields of the settings, a dataclass, tell one run from another, but those that end with "_every"."""

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""

    @property
    def batch(self) -> int:
        """Rows of a step, over all processes."""

    @property
    def rows_at_once(self) -> int:
        """Rows of a forward of a process; the rest of its rows is accumulated."""

    @property
    def weight_decay(self) -> float:
        """AdamW's."""

    @property
    def max_grad_norm(self) -> float:
        """Longer gradients are shortened to it."""

    @property
    def seed(self) -> int:
        """Of the order of the rows, and of dropout."""

    @property
    def save_every(self) -> int | None:
        """Steps between checkpoints (None: there are none, and a killed run begins anew)."""

    @property
    def log_every(self) -> int:
        """Steps between records."""

    @property
    def validate_every(self) -> int:
        """Steps between validations."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Stop when a validated value, the higher the better, has had no new best in `patience` validations.

    name: of the value in the records.
    patience: None: never; in any case the weights of the best validation are those that remain."""

    name: str
    patience: int | None = None


class Learner(Protocol):
    """A drafter that learns on the hidden states of a model. The loop calls its methods in each process alike."""

    @property
    def name(self) -> str:
        """For the progress bar."""

    @property
    def settings(self) -> LoopSettings:
        """Of the run."""

    @property
    def backbone(self) -> Backbone:
        """The model that is learned from."""

    @property
    def module(self) -> nn.Module:
        """The drafter; in training mode while the loop runs, but for validations."""

    @property
    def learned(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that change, in groups with a learning rate each."""

    @property
    def watch(self) -> Watch | None:
        """What says which weights are the best, None for the last ones."""

    def describe(self) -> dict:
        """What tells its run from another beside the settings and the rows, as values that `torch.save` takes."""

    def rates(self, step: int) -> Sequence[float]:
        """The learning rate of each group that is not empty."""

    def changed(self, step: int) -> list[nn.Parameter]:
        """The parameters that get gradients in a step."""

    def prepare(self, batch: Rows, step: int) -> Rows:
        """The rows as they are learned from in a step."""

    def count(self, batch: Rows, step: int) -> list[int]:
        """How many labels each loss has in the whole batch. Raises ValueError where there are too few."""

    def backward(self, part: Rows, counts: Sequence[int], step: int) -> Tensor:
        """Add the gradients of some of a batch's rows, whose losses are divided by the batch's `counts`.

        Returns the losses, sums over the labels of these rows."""

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """The record of the mean losses; its "loss" is what is minimised."""

    def validate(self) -> dict[str, float]:
        """What is measured on held-out data by name, {} without such data. In the main process alone."""


def require_counts(settings: LoopSettings) -> None:
    """Raise ValueError for a number of steps or rows below 1."""
    names = ("steps", "batch", "rows_at_once", "save_every", "log_every", "validate_every")
    require_at_least_one(settings, names)


def require_at_least_one(settings: LoopSettings, names: Sequence[str]) -> None:
    """Raise ValueError for one of these settings below 1; None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def cosine(step: int, steps: int, warmup: float) -> float:
    """A share of the learning rate: up over the share `warmup` of the steps, down to zero; 0 before the first step."""
    if step < 0:
        return 0.0
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
