"""The losses of an EAGLE-3 drafter over all steps of training-time test, in chunks over the draft vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.gpu import to_device
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.network.parts import linear
from specdec.training.data import Rows
from specdec.training.eagle3.network import plain_weight
from specdec.training.labels import IGNORED, shifted_labels
from specdec.training.linear_loss import Layer, Teacher, cross_entropy, divergence, linear_loss, total_variation

DISTANCES = {"kl": divergence, "tv": total_variation}
LOGITS = 2**27  # of a chunk: few beside what the steps keep for their gradients


@dataclass(frozen=True, slots=True)
class Positions:
    """The n positions that all steps learn from, those with one teacher side by side.

    places    `[n]` in the outputs of all steps, one step after the other
    steps     `[n]` which step it is
    weights   `[n]` of its loss
    labels    `[n]` ids of the draft vocabulary, for "ce"
    teachers  `[u]` places of the target's states that have the distributions, each once
    rows      `[n]` which of them, on the CPU, and `on_device` int32
    """

    places: Tensor
    steps: Tensor
    weights: Tensor
    labels: Tensor
    teachers: Tensor
    rows: Tensor
    on_device: Tensor


class DraftLoss:
    """The loss `kind`, see `Eagle3Settings`, of a network whose target has the output layer `head`.

    The target's distribution is that over the draft vocabulary alone.

    chunk: positions whose logits exist at a time (None: about 2^27 logits)."""

    def __init__(self, network: Eagle3Model, head: nn.Module, kind: str, chunk: int | None = None):
        config = network.config
        self._network, self._kind = network, kind
        self._chunk = max(1, LOGITS // config.draft_vocab_size) if chunk is None else chunk
        drafted = torch.arange(config.target_vocab_size) if network.draft_tokens is None else network.draft_tokens.cpu()
        # the place in the draft vocabulary of each of the target's tokens
        self._places = torch.full((config.target_vocab_size,), IGNORED)
        self._places[drafted] = torch.arange(len(drafted))
        self._teacher = None if kind == "ce" else _rows_of(head, network.draft_tokens)

    def labels(self, rows: Rows, step: int) -> Tensor:
        """The labels `[B, S]` of a step, IGNORED where nothing is learned; for "ce" ids of the draft vocabulary."""
        wanted = shifted_labels(rows.labels, step + 2, rows.documents)
        if self._kind != "ce":
            return wanted
        return torch.where(wanted == IGNORED, IGNORED, self._places[wanted.clamp(min=0)])

    def count(self, rows: Rows, depth: int) -> list[int]:
        """How many positions each step learns from."""
        return [int((self.labels(rows, step) != IGNORED).sum()) for step in range(depth)]

    def positions(self, rows: Rows, weights: Sequence[float], device: torch.device) -> Positions:
        """Where the steps learn, each with its weight; nothing waits for `device`, which may be busy meanwhile."""
        depth = len(weights)
        wanted = torch.stack([self.labels(rows, step).flatten() for step in range(depth)])
        # the target gives the label's distribution at the token before it, which is in the same row
        by_teacher = torch.stack([(of_step != IGNORED).roll(step + 1) for step, of_step in enumerate(wanted)], 1)
        teachers, steps = by_teacher.nonzero().unbind(1)
        places = teachers - steps - 1
        learned = by_teacher.any(1)
        rows_of = (learned.cumsum(0) - 1)[teachers]
        dtype = torch.promote_types(self._network.fc.weight.dtype, torch.float32)
        move = partial(to_device, device=device)
        return Positions(
            move(steps * wanted.shape[1] + places), move(steps), move(torch.tensor(weights, dtype=dtype)[steps]),
            move(wanted[steps, places]), move(learned.nonzero()[:, 0]), rows_of, move(rows_of.int()),
        )  # fmt: skip

    def __call__(self, outputs: Sequence[Tensor], states: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """The sum of each step's losses times its weight, and each step's own sum `[depth]`, without a gradient.

        outputs: of `unroll`; states `[B, S, H]`: what the target's output layer reads; positions: of these rows."""
        given = torch.cat(list(outputs)).index_select(0, positions.places)
        if self._teacher is None:
            overwrite = cross_entropy(positions.labels)
        else:
            taught = states.reshape(-1, states.shape[-1]).index_select(0, positions.teachers)
            teacher = Teacher(self._teacher, taught, positions.rows, positions.on_device)
            overwrite = DISTANCES[self._kind](teacher)
        weight = self._network.output_weight.to(given.dtype)  # once, not for each chunk
        learned = [weight] if weight.requires_grad else []
        layer = partial(linear, weight=weight)
        total, each = linear_loss(overwrite, layer, given, learned, self._chunk, positions.weights)
        return total, each.new_zeros(len(outputs)).index_add_(0, positions.steps, each)


def _rows_of(head: nn.Module, tokens: Tensor | None) -> Layer:
    """The output layer for these tokens alone, without gradients."""
    weight, bias = plain_weight(head), getattr(head, "bias", None)
    if tokens is not None:
        weight, bias = weight[tokens], None if bias is None else bias[tokens]

    def layer(states: Tensor) -> Tensor:
        with torch.no_grad():
            return functional.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))

    return layer
