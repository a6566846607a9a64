"""Training EAGLE-3 drafters (Li et al. 2025) on the hidden states of a frozen model, made as they are needed.

The loop, its checkpoints and its processes are those of `specdec.training.loop`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.acceptance import measured_length, watch_length
from specdec.training.backbone import Backbone, frozen_backbone
from specdec.training.data import Rows
from specdec.training.eagle3.loss import DraftLoss
from specdec.training.eagle3.settings import Eagle3Settings
from specdec.training.eagle3.unrolled import unroll
from specdec.training.learner import Watch
from specdec.training.loop import autocast, train
from specdec.training.network import describe_run
from specdec.training.sharding import is_fsdp


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

    `model` stays frozen, in whatever dtype or quantisation it is; `network` is best in float32, with
    `Accelerator(mixed_precision="bf16")`. With `prompts`, held-out ones as tokens, each validation decodes them with
    chains of `settings.num_tokens`; "tokens_per_round" of its record is the acceptance length, the weights of the best
    validation remain, and `settings.patience` may end the run early. Everything else, and what it raises, is as in
    `specdec.training.loop.train`; ValueError too for a P-EAGLE network, rows without a label, a patience without
    prompts, accelerate's FSDP, and for a model that scales or caps its logits unless the loss is "ce"."""
    from accelerate import Accelerator

    accelerator = accelerator or Accelerator()
    if is_fsdp(accelerator):
        raise ValueError("EAGLE-3's drafters are trained beside a model that is whole on each process, not FSDP")
    learner = _learner(model, network, settings, prompts, accelerator)
    return train(learner, rows, output, accelerator, progress)


@dataclass(frozen=True, slots=True)
class _Learner:
    """A `Learner` whose losses are those of the steps of training-time test."""

    name: ClassVar[str] = "EAGLE-3"

    backbone: Backbone
    module: Eagle3Model
    settings: Eagle3Settings
    prompts: Sequence[list[int]]
    accelerator: Any  # accelerate.Accelerator; accelerate is optional
    learned: dict[str, list[nn.Parameter]]
    loss: DraftLoss
    watch: Watch | None

    def describe(self) -> dict:
        """See `Learner`."""
        return describe_run(self.module, self.settings.validate_every, self.prompts)

    def rates(self, step: int) -> Sequence[float]:
        """See `Learner`."""
        return (self.settings.lr_at(step),)

    def changed(self, step: int) -> list[nn.Parameter]:
        """See `Learner`."""
        return self.learned["network"]

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
                features, states = self.backbone.features(tokens, self.module.config.target_layers, part.documents)
            positions = self.loss.positions(part, weights, model.device)  # on the CPU, while the model runs
            outputs = unroll(self.module, tokens, part.documents, features, settings.depth)
            total, sums = self.loss(outputs, states, positions)
        if total.requires_grad:
            total.backward()
        return sums

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""
        total = sum(self.settings.decay**depth * mean for depth, mean in enumerate(means))
        return {"loss": total} | {f"depth_{depth}_loss": mean for depth, mean in enumerate(means)}

    def validate(self) -> dict[str, float]:
        """The acceptance length over the held-out prompts, in the dtype of the model."""
        make = lambda module: Eagle3Drafter(module, self.settings.num_tokens)
        return measured_length(self.backbone.model, self.module, make, self.prompts, self.settings.max_new_tokens)


def _learner(model, network: Eagle3Model, settings: Eagle3Settings, prompts: Sequence[list[int]],
             accelerator) -> _Learner:  # fmt: skip
    """Check that the parts fit, and freeze the backbone."""
    if network.config.parallel:
        raise ValueError(f"P-EAGLE (mask_token {network.config.mask_token}) is trained in another way, not here")
    watch = watch_length(prompts, settings.patience)
    backbone = frozen_backbone(model, [] if settings.loss == "ce" else [settings.loss])
    learned = {"network": [p for p in network.parameters() if p.requires_grad]}
    loss = DraftLoss(network, backbone.lm_head, settings.loss)
    return _Learner(backbone, network, settings, prompts, accelerator, learned, loss, watch)
