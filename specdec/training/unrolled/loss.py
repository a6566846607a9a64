"""The losses of a drafter over all steps of training-time test, in chunks over the draft vocabulary."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.drafters.network.parts import linear
from specdec.training.data import Rows
from specdec.training.draft_loss import LOGITS, DraftVocabulary, Positions
from specdec.training.labels import IGNORED, shifted_labels
from specdec.training.linear_loss import DISTANCES, cross_entropy, linear_loss, positions_at_once


class Drafting(Protocol):
    """A network whose steps give states of tokens to an output layer."""

    @property
    def config(self) -> Any:
        """Has `draft_vocab_size` and `target_vocab_size`."""

    @property
    def draft_tokens(self) -> Tensor | None:
        """`[V_draft]`: the target's ids of the tokens that it drafts, None for all."""

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight `[V_draft, h]`."""

    def parameters(self) -> Any:
        """Its weights, all of one dtype."""


class DraftLoss:
    """The loss `kind`, see `UnrolledSettings`, of a network whose target has the output layer `head`.

    The target's distribution is that over the draft vocabulary alone.

    chunk: positions whose logits exist at a time (None: about 2^27 logits)."""

    def __init__(self, network: Drafting, head: nn.Module, kind: str, chunk: int | None = None):
        config = network.config
        self._network, self._kind = network, kind
        self._chunk = positions_at_once(config.draft_vocab_size, LOGITS) if chunk is None else chunk
        given = None if kind == "ce" else head
        self._vocabulary = DraftVocabulary(network.draft_tokens, config.target_vocab_size, given)

    def labels(self, rows: Rows, step: int) -> Tensor:
        """The labels `[B, S]` of a step, IGNORED where nothing is learned; for "ce" ids of the draft vocabulary."""
        wanted = shifted_labels(rows.labels, step + 2, rows.documents)
        if rows.marked is not None:
            wanted = torch.where(rows.marked > step, wanted, IGNORED)
        return self._vocabulary.labels(wanted) if self._kind == "ce" else wanted

    def count(self, rows: Rows, depth: int) -> list[int]:
        """How many positions each step learns from."""
        return [int((self.labels(rows, step) != IGNORED).sum()) for step in range(depth)]

    def positions(self, rows: Rows, weights: Sequence[float], device: torch.device) -> Positions:
        """Where the steps learn, each with its weight; a place is one in the outputs of all steps, one after another.

        Nothing waits for `device`, which may be busy meanwhile."""
        wanted = torch.stack([self.labels(rows, step).flatten() for step in range(len(weights))])
        steps, places = (wanted != IGNORED).nonzero().unbind(1)
        dtype = torch.promote_types(next(iter(self._network.parameters())).dtype, torch.float32)
        # the target gives the label's distribution at the token before it, which is in the same row
        return Positions.of(
            steps * wanted.shape[1] + places, steps, wanted[steps, places], places + steps + 1,
            torch.tensor(weights, dtype=dtype), device,
        )  # fmt: skip

    def __call__(self, outputs: Sequence[Tensor], states: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """The sum of each step's losses times its weight, and each step's own sum `[depth]`, without a gradient.

        outputs: of `unroll`; states `[B, S, H]`: what the target's output layer reads; positions: of these rows."""
        given = torch.cat(list(outputs)).index_select(0, positions.places)
        if self._kind == "ce":
            overwrite = cross_entropy(positions.labels)
        else:
            overwrite = DISTANCES[self._kind](self._vocabulary.teacher(states, positions))
        weight = self._network.output_weight.to(given.dtype)  # once, not for each chunk
        learned = [weight] if weight.requires_grad else []
        layer = partial(linear, weight=weight)
        total, each = linear_loss(overwrite, layer, given, learned, self._chunk, positions.weights)
        return total, each.new_zeros(len(outputs)).index_add_(0, positions.steps, each)
