"""The losses of a block drafter over its slots, in chunks over the draft vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.gpu import to_device
from specdec.drafters.block.module import BlockModel
from specdec.drafters.network.parts import linear
from specdec.training.block.anchors import slot_labels
from specdec.training.data import Rows
from specdec.training.draft_loss import LOGITS, DraftVocabulary, Positions
from specdec.training.labels import IGNORED
from specdec.training.linear_loss import (
    DISTANCES,
    Overwrite,
    cross_entropy,
    linear_loss,
    positions_at_once,
    weighted_sum,
)

Parts = Sequence[tuple[str, float]]
"""Losses by name, "ce", "kl" or "tv", and the weight of each in their sum."""


class BlockLoss:
    """The sum `parts` of losses of a network whose target has the output layer `head`.

    A slot's distribution is that after the text's own token before it. The target's, from which "kl" and "tv" measure,
    is that over the draft vocabulary alone. With "tv", and with a confidence head, whose loss is the binary
    cross-entropy with sum min(p, q), that sum is measured too: the probability that a drawn token is accepted.

    chunk: positions whose logits exist at a time (None: about 2^27 logits)."""

    def __init__(self, network: BlockModel, head: nn.Module, parts: Parts, chunk: int | None = None):
        config = network.config
        self._network, self._parts = network, [*parts]
        self._confident = network.confidence_head is not None
        names = [name for name, _ in parts]
        if self._confident and "tv" not in names:
            self._parts.append(("tv", 0.0))
        self._measured = [name for name, _ in self._parts].index("tv") if self._confident or "tv" in names else None
        self._chunk = positions_at_once(config.draft_vocab_size, LOGITS) if chunk is None else chunk
        self._only_ce = names == ["ce"] and not self._confident
        given = None if self._only_ce else head
        self._vocabulary = DraftVocabulary(network.draft_tokens, config.target_vocab_size, given)

    @property
    def sums(self) -> list[str]:
        """What is summed up beside the loss of each slot, over all slots."""
        measured = [] if self._measured is None else ["rejected"]
        return measured + (["confidence"] if self._confident else [])

    def labels(self, rows: Rows) -> Tensor:
        """The labels `[B, S, K]` of slots after each token, of those that have a loss; for "ce" alone, drafted ones."""
        wanted = slot_labels(rows, self._network.config.num_slots)
        return torch.where(self._vocabulary.labels(wanted) == IGNORED, IGNORED, wanted) if self._only_ce else wanted

    def count(self, rows: Rows) -> list[int]:
        """How many labels each slot has after the anchors marked in `rows`, and each of `sums`."""
        assert rows.marked is not None
        of_slots = (self.labels(rows)[rows.marked] != IGNORED).sum(0)
        return [*of_slots.tolist(), *[int(of_slots.sum())] * len(self.sums)]

    def positions(self, rows: Rows, weights: Sequence[float], device: torch.device) -> tuple[Tensor, Positions]:
        """The anchors `[M]` marked in `rows`, on the CPU, and where their slots learn, each with its weight.

        weights `[K]`: of the slots. A place is one in `[M * K]`. Nothing waits for `device`."""
        assert rows.marked is not None
        anchors = rows.marked.flatten().nonzero()[:, 0]
        wanted = self.labels(rows).flatten(0, 1)[anchors]
        blocks, slots = (wanted != IGNORED).nonzero().unbind(1)
        dtype = torch.promote_types(self._network.fc.weight.dtype, torch.float32)
        # the target gives a slot's distribution at the token before, k after the anchor
        return anchors, Positions.of(
            blocks * wanted.shape[1] + slots, slots, self._vocabulary.labels(wanted[blocks, slots]),
            anchors[blocks] + slots, torch.tensor(weights, dtype=dtype), device,
        )  # fmt: skip

    def __call__(self, places: Tensor, before: Tensor, states: Tensor, positions: Positions,
                 confidence_weight: float) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sum of the slots' losses times their weights and, times its own, of the confidence head's.

        places     `[M, B, h]` of `run_blocks`
        before     `[M, K]`, the text's token before each slot
        states     `[R, S, H]`, what the target's output layer reads
        positions  of these rows

        Returns with it each slot's sum of losses and `sums`, one tensor without a gradient."""
        network = self._network
        hidden, said = network.slots(places), network.said(places, before)
        take = lambda x: x.flatten(0, 1).index_select(0, positions.places)
        read = take(hidden)
        weight, added = network.output_weight.to(read.dtype), None  # once, not for each chunk
        learned, width = [weight] if weight.requires_grad else [], read.shape[1]
        if said is not None:
            assert network.markov_head is not None
            added = network.markov_head.markov_w2.weight.to(read.dtype)
            learned, read = [*learned, added], torch.cat([read, take(said).to(read.dtype)], 1)

        def layer(given: Tensor) -> Tensor:
            logits = network.logits(given[:, :width], weight)
            return logits if added is None else logits + linear(given[:, width:], added)

        dtype = torch.promote_types(read.dtype, torch.float32)
        each = read.new_zeros(len(read), len(self._parts), dtype=dtype)
        overwrite = weighted_sum([(share, self._part(name, states, positions)) for name, share in self._parts], each)
        total, losses = linear_loss(overwrite, layer, read, learned, self._chunk, positions.weights)
        sums = [losses.new_zeros(before.shape[1]).index_add_(0, positions.steps, losses)]
        if self._measured is not None:
            sums.append(each[:, self._measured].sum(0, keepdim=True))
        if self._confident:
            assert self._measured is not None and network.confidence_head is not None
            seen = network.read_by_confidence(read[:, :width], take(before)).detach()
            sure = network.confidence_head(seen).to(dtype)
            lost = functional.binary_cross_entropy_with_logits(sure, 1 - each[:, self._measured], reduction="sum")
            total, sums = total + confidence_weight * lost, [*sums, lost.detach()[None]]
        return total, torch.cat(sums)

    def _part(self, name: str, states: Tensor, positions: Positions) -> Overwrite:
        """One of the losses at `positions`."""
        if name != "ce":
            return DISTANCES[name](self._vocabulary.teacher(states, positions))
        every = self._only_ce or self._network.draft_tokens is None
        return cross_entropy(positions.labels.clamp(min=0), None if every else positions.labels == IGNORED)


def tokens_before(tokens: Tensor, anchors: Tensor, slots: int) -> Tensor:
    """The token before each slot of the blocks after `anchors [M]`, `[M, K]`: the anchor, then the text's next ones.

    tokens `[R, S]`; anchors on the CPU, places among them all. After the end of all come the last ones again."""
    places = (anchors[:, None] + torch.arange(slots)).clamp(max=tokens.numel() - 1)
    return tokens.flatten()[to_device(places, tokens.device)]
