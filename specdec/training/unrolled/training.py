"""Training drafters by the steps that decoding takes after every token of a text (Li et al. 2025, training-time test).

The loop, its checkpoints and its processes are those of `specdec.training.loop`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention.hf.hidden_states import Layers
from specdec.drafters.base import Drafter
from specdec.training.backbone import Backbone
from specdec.training.data import Rows
from specdec.training.loop import autocast
from specdec.training.network_learner import train_network
from specdec.training.unrolled.loss import DraftLoss
from specdec.training.unrolled.marks import mark_depths
from specdec.training.unrolled.settings import UnrolledSettings

Unroll = Callable[[Rows, Tensor, Tensor, int], list[Tensor]]
"""`unroll(rows, tokens [B, S], features [B, S, F], depth)` -> the outputs `[B * S, h]` of each step; `rows` are on the
CPU, `tokens` are theirs on the device."""


@dataclass(frozen=True, slots=True)
class UnrolledKind:
    """A kind of drafter that is trained by steps.

    layers: the states of the target that it reads, as `Backbone.features` takes them.
    unroll: the training forward.
    make: `make(network, num_tokens)`, a drafter of chains of so many with a copy of the network.
    about: what tells the network from others, see `Learner.describe`.
    """

    name: str
    layers: Layers
    unroll: Unroll
    make: Callable[[Any, int], Drafter]
    about: dict


def train_unrolled(
    kind: UnrolledKind,
    model,
    network: nn.Module,
    rows: Rows,
    output: str | Path,
    settings: UnrolledSettings,
    prompts: Sequence[list[int]] = (),
    accelerator=None,
    progress: bool = True,
) -> list[dict]:
    """Train `network`, a `Drafting` of a kind, in place to draft for `model` over `rows`; returns the log.

    Validations decode chains of `settings.num_tokens`. Everything else, and what it raises, is as in
    `specdec.training.network_learner.train_network`, whose distances are all losses but "ce"; ValueError too for rows
    without a label."""

    def objective(backbone: Backbone, accelerator) -> Unrolling:
        drafting: Any = network
        loss = DraftLoss(drafting, backbone.lm_head, settings.loss)
        return Unrolling(kind, backbone, settings, accelerator, loss)

    distances = [] if settings.loss == "ce" else [settings.loss]
    return train_network(objective, model, network, rows, output, settings, distances, prompts, accelerator, progress)


@dataclass(frozen=True, slots=True)
class Unrolling:
    """An `Objective` whose losses are those of the steps after every token."""

    kind: UnrolledKind
    backbone: Backbone
    settings: UnrolledSettings
    accelerator: Any  # accelerate.Accelerator; accelerate is optional
    loss: DraftLoss

    @property
    def name(self) -> str:
        """See `Learner`."""
        return self.kind.name

    def describe(self) -> dict:
        """See `Learner`."""
        return self.kind.about

    def prepare(self, batch: Rows, step: int) -> Rows:
        """The batch, with the steps that are kept marked where not all are."""
        if self.settings.keep == 1:
            return batch
        labels = torch.stack([self.loss.labels(batch, depth) for depth in range(self.settings.depth)])
        return mark_depths(batch, labels, self.settings, step)

    def count(self, batch: Rows, step: int) -> list[int]:
        """See `Learner`: of each step after a token."""
        counts = self.loss.count(batch, self.settings.depth)
        if not counts[0]:
            raise ValueError(
                f"the rows of step {step} have no label that can be drafted: take more rows a step, longer texts, or a "
                "larger draft vocabulary"
            )
        return counts

    def backward(self, part: Rows, counts: Sequence[int], step: int) -> Tensor:
        """See `Learner`."""
        model, settings = self.backbone.model, self.settings
        weights = [settings.decay**depth / max(1, count) for depth, count in enumerate(counts)]
        tokens = part.tokens.to(model.device, non_blocking=True)
        with autocast(model, self.accelerator):
            with torch.no_grad():
                features, states = self.backbone.features(tokens, self.kind.layers, part.documents)
            positions = self.loss.positions(part, weights, model.device)  # on the CPU, while the model runs
            outputs = self.kind.unroll(part, tokens, features, settings.depth)
            total, sums = self.loss(outputs, states, positions)
        if total.requires_grad:
            total.backward()
        return sums

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""
        total = sum(self.settings.decay**depth * mean for depth, mean in enumerate(means))
        return {"loss": total} | {f"depth_{depth}_loss": mean for depth, mean in enumerate(means)}

    def drafter(self, network) -> Drafter:
        """See `Objective`."""
        return self.kind.make(network, self.settings.num_tokens)
