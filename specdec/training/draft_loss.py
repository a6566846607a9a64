"""What losses of drafters share: the places that learn, and the target's distributions over the draft vocabulary."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.gpu import to_device
from specdec.training.labels import IGNORED
from specdec.training.linear_loss import Layer, Teacher
from specdec.training.network import plain_weight

LOGITS = 2**27  # of a chunk: few beside what the network keeps for its gradients


@dataclass(frozen=True, slots=True)
class Positions:
    """The n positions that learn, those with one teacher side by side.

    places    `[n]` in the drafter's outputs
    steps     `[n]` how many tokens ahead each predicts, from 0 on
    weights   `[n]` of its loss
    labels    `[n]` ids of the target, or of the draft vocabulary
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

    @classmethod
    def of(cls, places: Tensor, steps: Tensor, labels: Tensor, teachers: Tensor, weights: Tensor,
           device: torch.device) -> "Positions":  # fmt: skip
        """From `[n]` each, on the CPU, in any order; nothing waits for `device`, which may be busy meanwhile.

        teachers: of each position, a place in the target's states; weights: of each step."""
        order = teachers.sort(stable=True).indices
        places, steps, labels = places[order], steps[order], labels[order]
        taught, rows = teachers[order].unique_consecutive(return_inverse=True)
        move = partial(to_device, device=device)
        learned = move(places), move(steps), move(weights[steps]), move(labels)
        return cls(*learned, move(taught), rows, move(rows.int()))


class DraftVocabulary:
    """The tokens that are drafted, and the distributions of the target's output layer `head` over them alone.

    draft_tokens [V_draft]: the target's ids, None for all of its `size` tokens.
    head: None where no distribution is wanted."""

    def __init__(self, draft_tokens: Tensor | None, size: int, head: nn.Module | None):
        drafted = torch.arange(size) if draft_tokens is None else draft_tokens.cpu()
        # the place in the draft vocabulary of each of the target's tokens
        self._places = torch.full((size,), IGNORED)
        self._places[drafted] = torch.arange(len(drafted))
        self._teacher = None if head is None else _rows_of(head, draft_tokens)

    def labels(self, wanted: Tensor) -> Tensor:
        """Labels on the CPU as ids of the draft vocabulary, IGNORED where they cannot be drafted."""
        return torch.where(wanted == IGNORED, IGNORED, self._places[wanted.clamp(min=0)])

    def teacher(self, states: Tensor, positions: Positions) -> Teacher:
        """The distributions that `positions` learn from; `states [B, S, H]`: what the target's output layer reads."""
        assert self._teacher is not None
        taught = states.reshape(-1, states.shape[-1]).index_select(0, positions.teachers)
        return Teacher(self._teacher, taught, positions.rows, positions.on_device)


def _rows_of(head: nn.Module, tokens: Tensor | None) -> Layer:
    """The output layer for these tokens alone, without gradients."""
    weight, bias = plain_weight(head), getattr(head, "bias", None)
    if tokens is not None:
        weight, bias = weight[tokens], None if bias is None else bias[tokens]

    def layer(states: Tensor) -> Tensor:
        with torch.no_grad():
            return functional.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))

    return layer
