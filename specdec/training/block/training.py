"""Training block drafters (DFlash; DSpark, arXiv 2607.05147) on the hidden states of a frozen model, made as needed.

The loop, its checkpoints and its processes are those of `specdec.training.loop`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from specdec.drafters.block.config import require_layers
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.module import BlockModel
from specdec.training.acceptance import measured_length, watch_length
from specdec.training.backbone import Backbone, frozen_backbone
from specdec.training.block.anchors import mark_anchors
from specdec.training.block.blocks import run_blocks
from specdec.training.block.loss import BlockLoss, tokens_before
from specdec.training.block.settings import BlockSettings
from specdec.training.data import Rows
from specdec.training.learner import Watch
from specdec.training.loop import autocast, train
from specdec.training.network import describe_run
from specdec.training.sharding import is_fsdp


def train_block(
    model,
    network: BlockModel,
    rows: Rows,
    output: str | Path,
    settings: BlockSettings,
    prompts: Sequence[list[int]] = (),
    accelerator=None,
    progress: bool = True,
) -> list[dict]:
    """Train `network` in place to draft for `model` over `rows`; returns the log, a list of records.

    `model`, `network`, `prompts` and what a run leaves are as in `specdec.training.eagle3.training.train_eagle3`; a
    record's "acceptance", where the loss has "tv" or the network a confidence head, is the mean of sum min(p, q) over
    all slots. Raises ValueError for a network with a selector, states that the model does not have, a patience without
    prompts, accelerate's FSDP, rows without a block that holds tokens of an answer, and for a model that scales or
    caps its logits unless the loss is "ce" and there is no confidence head; and what `specdec.training.loop.train`
    raises."""
    from accelerate import Accelerator

    accelerator = accelerator or Accelerator()
    if is_fsdp(accelerator):
        raise ValueError("block drafters are trained beside a model that is whole on each process, not FSDP")
    learner = _learner(model, network, settings, prompts, accelerator)
    return train(learner, rows, output, accelerator, progress)


@dataclass(frozen=True, slots=True)
class _Learner:
    """A `Learner` whose losses are those of the slots of random blocks."""

    name: ClassVar[str] = "block drafter"

    backbone: Backbone
    module: BlockModel
    settings: BlockSettings
    prompts: Sequence[list[int]]
    accelerator: Any  # accelerate.Accelerator; accelerate is optional
    learned: dict[str, list[nn.Parameter]]
    loss: BlockLoss
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
        """The batch with its anchors marked."""
        generator = torch.Generator().manual_seed(hash((self.settings.seed, step)) % 2**63)
        return mark_anchors(batch, self.loss.labels(batch), self.settings.anchors, generator)

    def count(self, batch: Rows, step: int) -> list[int]:
        """See `Learner`: of each slot, and of what is summed up over all."""
        counts = self.loss.count(batch)
        if not any(counts):
            raise ValueError(
                f"the rows of step {step} have no block with a label that can be drafted: take more rows a step, "
                "longer texts, or a larger draft vocabulary"
            )
        return counts

    def backward(self, part: Rows, counts: Sequence[int], step: int) -> Tensor:
        """See `Learner`."""
        model, slots = self.backbone.model, self.module.config.num_slots
        of_slots = zip(self.settings.slot_weights(slots), counts, strict=False)
        weights = [weight / max(1, count) for weight, count in of_slots]
        anchors, positions = self.loss.positions(part, weights, model.device)
        if not len(anchors):
            return torch.zeros(len(counts), device=model.device)
        tokens = part.tokens.to(model.device, non_blocking=True)
        with autocast(model, self.accelerator):
            with torch.no_grad():
                features, states = self.backbone.features(tokens, self.module.config.target_layers, part.documents)
            places = run_blocks(self.module, tokens, part.documents, features, anchors)
            before = tokens_before(tokens, anchors, slots)
            total, sums = self.loss(places, before, states, positions, 1 / sum(counts[:slots]))
        total.backward()
        return sums

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""
        slots = self.module.config.num_slots
        of_slots, others = means[:slots], dict(zip(self.loss.sums, means[slots:], strict=True))
        weights = self.settings.slot_weights(slots)
        told = {"loss": sum(weight * mean for weight, mean in zip(weights, of_slots, strict=True))}
        told |= {f"slot_{slot}_loss": mean for slot, mean in enumerate(of_slots)}
        if "rejected" in others:
            told["acceptance"] = 1 - others["rejected"]
        return told | ({"confidence_loss": others["confidence"]} if "confidence" in others else {})

    def validate(self) -> dict[str, float]:
        """The acceptance length over the held-out prompts, in the dtype of the model."""
        settings = self.settings
        make = lambda module: BlockDrafter(cast(BlockModel, module), settings.num_tokens)
        return measured_length(self.backbone.model, self.module, make, self.prompts, settings.max_new_tokens)


def _learner(model, network: BlockModel, settings: BlockSettings, prompts: Sequence[list[int]],
             accelerator) -> _Learner:  # fmt: skip
    """Check that the parts fit, and freeze the backbone."""
    config, names = network.config, [name for name, _ in settings.loss]
    if config.markov == "selector":
        raise ValueError(f"a selector (DFlash2) is trained in another way, not here: markov is {config.markov!r}")
    if settings.num_tokens is not None and settings.num_tokens > config.num_slots:
        raise ValueError(
            f"a block of {config.block_size} predicts {config.num_slots} tokens, got num_tokens {settings.num_tokens}"
        )
    require_layers(config.target_layers, model.config.get_text_config().num_hidden_layers)
    watch = watch_length(prompts, settings.patience)
    distances = [name for name in names if name != "ce"]
    backbone = frozen_backbone(model, distances + ([] if network.confidence_head is None else ["confidence"]))
    learned = {"network": [p for p in network.parameters() if p.requires_grad]}
    loss = BlockLoss(network, backbone.lm_head, settings.loss)
    return _Learner(backbone, network, settings, prompts, accelerator, learned, loss, watch)
