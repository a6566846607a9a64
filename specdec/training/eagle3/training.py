"""Training EAGLE-3 drafters (Li et al. 2025) on the hidden states of a frozen model, made as they are needed.

The loop, its checkpoints and its processes are those of `specdec.training.loop`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.drafters.base import Drafter
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.backbone import Backbone
from specdec.training.data import Rows
from specdec.training.eagle3.loss import DraftLoss
from specdec.training.eagle3.settings import Eagle3Settings
from specdec.training.eagle3.unrolled import unroll
from specdec.training.loop import autocast
from specdec.training.network_learner import train_network


def train_eagle3(
    model,
    network: Eagle3Model,
    rows: Rows,
    output: str | Path,
    settings: Eagle3Settings,
    prompts: Sequence[list[int]] = (),
    accelerator=None,
    progress: bool = True,
) -> list[dict]:
    """Train `network` in place to draft for `model` over `rows`; returns the log, a list of records.

    Validations decode chains of `settings.num_tokens`. Everything else, and what it raises, is as in
    `specdec.training.network_learner.train_network`, whose distances are all losses but "ce"; ValueError too for a
    P-EAGLE network, and rows without a label."""
    if network.config.parallel:
        raise ValueError(f"P-EAGLE (mask_token {network.config.mask_token}) is trained in another way, not here")

    def objective(backbone: Backbone, accelerator) -> Unrolling:
        loss = DraftLoss(network, backbone.lm_head, settings.loss)
        return Unrolling(backbone, network, settings, accelerator, loss)

    distances = [] if settings.loss == "ce" else [settings.loss]
    return train_network(objective, model, network, rows, output, settings, distances, prompts, accelerator, progress)


@dataclass(frozen=True, slots=True)
class Unrolling:
    """An `Objective` whose losses are those of the steps of training-time test."""

    name: ClassVar[str] = "EAGLE-3"

    backbone: Backbone
    network: Eagle3Model
    settings: Eagle3Settings
    accelerator: Any  # accelerate.Accelerator; accelerate is optional
    loss: DraftLoss

    def prepare(self, batch: Rows, step: int) -> Rows:
        """See `Learner`."""
        return batch

    def count(self, batch: Rows, step: int) -> list[int]:
        """See `Learner`: of each step of training-time test."""
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
                features, states = self.backbone.features(tokens, self.network.config.target_layers, part.documents)
            positions = self.loss.positions(part, weights, model.device)  # on the CPU, while the model runs
            outputs = unroll(self.network, tokens, part.documents, features, settings.depth)
            total, sums = self.loss(outputs, states, positions)
        if total.requires_grad:
            total.backward()
        return sums

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""
        total = sum(self.settings.decay**depth * mean for depth, mean in enumerate(means))
        return {"loss": total} | {f"depth_{depth}_loss": mean for depth, mean in enumerate(means)}

    def drafter(self, network: Eagle3Model) -> Drafter:
        """See `Objective`."""
        return Eagle3Drafter(network, self.settings.num_tokens)
