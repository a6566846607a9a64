"""Training block drafters (DFlash; DSpark, arXiv 2607.05147) on the hidden states of a frozen model, made as needed.

The loop, its checkpoints and its processes are those of `specdec.training.loop`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.drafters.base import Drafter
from specdec.drafters.block.config import require_layers
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.module import BlockModel
from specdec.training.backbone import Backbone
from specdec.training.block.anchors import mark_anchors
from specdec.training.block.blocks import run_blocks
from specdec.training.block.loss import BlockLoss, tokens_before
from specdec.training.block.settings import BlockSettings
from specdec.training.data import Rows
from specdec.training.loop import autocast
from specdec.training.network_learner import about_network, train_network


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

    Validations decode chains of `settings.num_tokens`. A record's "acceptance", where the loss has "tv" or the network
    a confidence head, is the mean of sum min(p, q) over all slots. Everything else, and what it raises, is as in
    `specdec.training.network_learner.train_network`, whose distances are all losses but "ce", and the confidence
    head's. Raises ValueError too for DFlash2's selector, Domino's head, states that the model does not have, more
    `num_tokens` than a block predicts, and rows without a block that holds tokens of an answer."""
    _require_trainable(model, network, settings)

    def objective(backbone: Backbone, accelerator) -> RandomBlocks:
        loss = BlockLoss(network, backbone.lm_head, settings.loss)
        return RandomBlocks(backbone, network, settings, accelerator, loss)

    distances = [name for name, _ in settings.loss if name != "ce"]
    distances += [] if network.confidence_head is None else ["confidence"]
    return train_network(objective, model, network, rows, output, settings, distances, prompts, accelerator, progress)


@dataclass(frozen=True, slots=True)
class RandomBlocks:
    """An `Objective` whose losses are those of the slots of random blocks."""

    name: ClassVar[str] = "block drafter"

    backbone: Backbone
    network: BlockModel
    settings: BlockSettings
    accelerator: Any  # accelerate.Accelerator; accelerate is optional
    loss: BlockLoss

    def describe(self) -> dict:
        """See `Objective`."""
        return about_network(self.network)

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
        model, config = self.backbone.model, self.network.config
        of_slots = zip(self.settings.slot_weights(config.num_slots), counts, strict=False)
        weights = [weight / max(1, count) for weight, count in of_slots]
        anchors, positions = self.loss.positions(part, weights, model.device)
        if not len(anchors):
            return torch.zeros(len(counts), device=model.device)
        tokens = part.tokens.to(model.device, non_blocking=True)
        with autocast(model, self.accelerator):
            with torch.no_grad():
                features, states = self.backbone.features(tokens, config.target_layers, part.documents)
            places = run_blocks(self.network, tokens, part.documents, features, anchors)
            before = tokens_before(tokens, anchors, config.num_slots)
            total, sums = self.loss(places, before, states, positions, 1 / sum(counts[: config.num_slots]))
        total.backward()
        return sums

    def report(self, means: Sequence[float], step: int) -> dict[str, float]:
        """See `Learner`."""
        slots = self.network.config.num_slots
        of_slots, others = means[:slots], dict(zip(self.loss.sums, means[slots:], strict=True))
        weights = self.settings.slot_weights(slots)
        told = {"loss": sum(weight * mean for weight, mean in zip(weights, of_slots, strict=True))}
        told |= {f"slot_{slot}_loss": mean for slot, mean in enumerate(of_slots)}
        if "rejected" in others:
            told["acceptance"] = 1 - others["rejected"]
        return told | ({"confidence_loss": others["confidence"]} if "confidence" in others else {})

    def drafter(self, network: BlockModel) -> Drafter:
        """See `Objective`."""
        return BlockDrafter(network, self.settings.num_tokens)


def _require_trainable(model, network: BlockModel, settings: BlockSettings) -> None:
    """Raise ValueError for a network that is not trained here, and for what does not fit it."""
    config = network.config
    if config.markov in ("selector", "domino"):
        raise ValueError(
            f"DFlash2's selector and Domino's head are trained in other ways, got markov {config.markov!r}"
        )
    if settings.num_tokens is not None and settings.num_tokens > config.num_slots:
        raise ValueError(
            f"a block of {config.block_size} predicts {config.num_slots} tokens, got num_tokens {settings.num_tokens}"
        )
    require_layers(config.target_layers, model.config.get_text_config().num_hidden_layers)
