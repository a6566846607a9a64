"""Training a network of any kind to draft for a frozen model: what is alike for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from specdec.drafters.base import Drafter
from specdec.training.acceptance import measured_length, watch_length
from specdec.training.backbone import Backbone, frozen_backbone
from specdec.training.data import Rows
from specdec.training.learner import Watch
from specdec.training.loop import train
from specdec.training.network_settings import NetworkSettings
from specdec.training.sharding import is_fsdp


class Objective(Protocol):
    """What a kind of network learns from a batch; methods of a `Learner`'s names do what it says there."""

    @property
    def name(self) -> str:
        """See `Learner`."""

    def describe(self) -> dict:
        """What tells the network from others, see `Learner`."""

    def prepare(self, batch: Rows, step: int) -> Rows:
        """See `Learner`."""

    def count(self, batch: Rows, step: int) -> list[int]:
        """See `Learner`."""

    def backward(self, part: Rows, counts: Sequence[int], step: int) -> Tensor:
        """See `Learner`."""

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""

    def drafter(self, network) -> Drafter:
        """The drafter that a validation decodes with, of a copy of the network in the model's dtype."""


def about_network(network) -> dict:
    """The config and the draft vocabulary of an EAGLE-3 or block network, for `Objective.describe`."""
    config, tokens = network.config, network.draft_tokens
    told = {name: value for name, value in asdict(config).items() if name != "rotation"}
    drafted = None if tokens is None else [len(tokens), int(tokens.sum())]
    return {"network": told, "rotation": repr(config.rotation), "drafted": drafted}


@dataclass(frozen=True, slots=True)
class NetworkLearner:
    """A `Learner` with one learning rate, whose validations measure the acceptance length on `prompts`."""

    objective: Objective
    backbone: Backbone
    module: nn.Module
    settings: NetworkSettings
    prompts: Sequence[list[int]]
    learned: dict[str, list[nn.Parameter]]
    watch: Watch | None

    @property
    def name(self) -> str:
        """See `Learner`."""
        return self.objective.name

    def describe(self) -> dict:
        """See `Learner`."""
        # the best validation's weights remain, so when they are matters too
        watched = [self.settings.validate_every, sum(map(sum, self.prompts))] if self.watch else None
        return self.objective.describe() | {"watched": watched}

    def rates(self, step: int) -> Sequence[float]:
        """See `Learner`."""
        return (self.settings.lr_at(step),)

    def changed(self, step: int) -> list[nn.Parameter]:
        """See `Learner`."""
        return self.learned["network"]

    def prepare(self, batch: Rows, step: int) -> Rows:
        """See `Learner`."""
        return self.objective.prepare(batch, step)

    def count(self, batch: Rows, step: int) -> list[int]:
        """See `Learner`."""
        return self.objective.count(batch, step)

    def backward(self, part: Rows, counts: Sequence[int], step: int) -> Tensor:
        """See `Learner`."""
        return self.objective.backward(part, counts, step)

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""
        return self.objective.report(means, step)

    def validate(self) -> dict[str, float]:
        """The acceptance length over the held-out prompts, in the dtype of the model."""
        make, model = self.objective.drafter, self.backbone.model
        return measured_length(model, self.module, make, self.prompts, self.settings.max_new_tokens)


def train_network(
    objective: Callable[[Backbone, Any], Objective],
    model,
    network: nn.Module,
    rows: Rows,
    output: str | Path,
    settings: NetworkSettings,
    distances: Sequence[str] = (),
    prompts: Sequence[list[int]] = (),
    accelerator=None,
    progress: bool = True,
) -> list[dict]:
    """Train `network` in place to draft for `model` over `rows`; returns the log, a list of records.

    `model` stays frozen, in whatever dtype or quantisation it is; `network` is best in float32, with
    `Accelerator(mixed_precision="bf16")`. With `prompts`, held-out ones as tokens, each validation decodes them;
    "tokens_per_round" of its record is the acceptance length, the weights of the best validation remain, and
    `settings.patience` may end the run early.

    objective  `objective(backbone, accelerator)`
    distances  names of losses that compare with the model's distributions

    Everything else, and what it raises, is as in `specdec.training.loop.train`; ValueError too for a patience without
    prompts, accelerate's FSDP, and `distances` from a model that scales or caps its logits."""
    from accelerate import Accelerator

    accelerator = accelerator or Accelerator()
    if is_fsdp(accelerator):
        raise ValueError("a drafter's network is trained beside a model that is whole on each process, not FSDP")
    watch, backbone = watch_length(prompts, settings.patience), frozen_backbone(model, distances)
    learned = {"network": [p for p in network.parameters() if p.requires_grad]}
    made = objective(backbone, accelerator)
    learner = NetworkLearner(made, backbone, network, settings, prompts, learned, watch)
    return train(learner, rows, output, accelerator, progress)
