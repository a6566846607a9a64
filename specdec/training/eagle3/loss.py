"""The losses of an EAGLE-3 drafter over all steps of training-time test, in chunks over the draft vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.data import Rows
from specdec.training.eagle3.network import plain_weight
from specdec.training.labels import IGNORED, shifted_labels
from specdec.training.linear_loss import (
    Layer,
    cross_entropy,
    divergence,
    linear_loss,
    positions_at_once,
    total_variation,
)

DISTANCES = {"kl": divergence, "tv": total_variation}


class DraftLoss:
    """The loss `kind`, see `Eagle3Settings`, of a network whose target has the output layer `head`.

    The target's distribution is that over the draft vocabulary alone.

    chunk: positions whose logits exist at a time (None: about 2^28 logits)."""

    def __init__(self, network: Eagle3Model, head: nn.Module, kind: str, chunk: int | None = None):
        config = network.config
        self._network, self._kind = network, kind
        self._chunk = positions_at_once(config.draft_vocab_size) if chunk is None else chunk
        drafted = torch.arange(config.target_vocab_size) if network.draft_tokens is None else network.draft_tokens.cpu()
        # the place in the draft vocabulary of each of the target's tokens
        self._places = torch.full((config.target_vocab_size,), IGNORED)
        self._places[drafted] = torch.arange(len(drafted))
        self._teacher = None if kind == "ce" else _rows_of(head, network.draft_tokens)
        weights = {"own": "lm_head.weight", "embeddings": "embed_tokens.weight"}.get(config.output)
        self._learned = [p for name, p in network.named_parameters() if name == weights and p.requires_grad]

    def labels(self, rows: Rows, step: int) -> Tensor:
        """The labels `[B, S]` of a step, IGNORED where nothing is learned; for "ce" ids of the draft vocabulary."""
        wanted = shifted_labels(rows.labels, step + 2, rows.documents)
        if self._kind != "ce":
            return wanted
        return torch.where(wanted == IGNORED, IGNORED, self._places[wanted.clamp(min=0)])

    def count(self, rows: Rows, depth: int) -> list[int]:
        """How many positions each step learns from."""
        return [int((self.labels(rows, step) != IGNORED).sum()) for step in range(depth)]

    def __call__(self, outputs: Sequence[Tensor], states: Tensor, rows: Rows,
                 weights: Sequence[float]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sum of each step's losses times its weight, and each step's own sum `[depth]`, without a gradient.

        outputs: of `unroll`; states `[B, S, H]`: what the target's output layer reads."""
        parts, targets, counts = [], [], []
        for step, output in enumerate(outputs):
            wanted = self.labels(rows, step).flatten()
            places = (wanted != IGNORED).nonzero()[:, 0]
            counts.append(len(places))
            there = places.to(output.device, non_blocking=True)
            parts.append(output[there])
            # the target gives the label's distribution at the token before it, which is in the same row
            targets.append(wanted[places].to(output.device) if self._teacher is None
                           else states.reshape(-1, states.shape[-1])[there + step + 1])  # fmt: skip
        steps = torch.repeat_interleave(torch.tensor(counts))
        given = torch.cat(parts)
        by_position = torch.tensor(weights, dtype=torch.promote_types(given.dtype, torch.float32))[steps]
        target = torch.cat(targets)
        overwrite = cross_entropy(target) if self._teacher is None else DISTANCES[self._kind](self._teacher, target)
        total, each = linear_loss(
            overwrite, self._network.logits, given, self._learned, self._chunk, by_position.to(given.device)
        )
        sums = each.new_zeros(len(outputs)).index_add_(0, steps.to(each.device), each)
        return total, sums


def _rows_of(head: nn.Module, tokens: Tensor | None) -> Layer:
    """The output layer for these tokens alone, without gradients."""
    weight, bias = plain_weight(head), getattr(head, "bias", None)
    if tokens is not None:
        weight, bias = weight[tokens], None if bias is None else bias[tokens]

    def layer(states: Tensor) -> Tensor:
        with torch.no_grad():
            return functional.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))

    return layer
