"""The anchors that a step learns from: random ones among those whose blocks hold tokens of answers."""

import torch
from torch import Tensor

from specdec.training.data import Rows
from specdec.training.labels import IGNORED, shifted_labels


def slot_labels(rows: Rows, slots: int) -> Tensor:
    """The label of each slot of the block after each token `[B, S, K]`, IGNORED outside the text and its answers.

    Slot k predicts the token k + 1 places after the anchor, wherever its place in the block is.

    >>> tokens = torch.tensor([[5, 6, 7]])
    >>> slot_labels(Rows(tokens, tokens, torch.zeros_like(tokens)), 2).tolist()
    [[[6, 7], [7, -100], [-100, -100]]]
    """
    return torch.stack([shifted_labels(rows.labels, slot + 1, rows.documents) for slot in range(slots)], 2)


def mark_anchors(rows: Rows, labels: Tensor, most: int, generator: torch.Generator) -> Rows:
    """`rows` with at most `most` random anchors marked in each, drawn from those that can be one.

    That is a token with another one of its text before it, whose states are context, and with a label in its block.

    labels `[B, S, K]`: of the slots after each token, see `slot_labels`."""
    documents, possible = rows.documents, (labels != IGNORED).any(2)
    possible[:, 0] = False
    possible[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    drawn = torch.rand(possible.shape, generator=generator).masked_fill(~possible, -1)
    chosen = drawn.topk(min(most, possible.shape[1]), 1).indices
    marked = torch.zeros_like(possible).scatter(1, chosen, True) & possible
    return Rows(rows.tokens, rows.labels, documents, marked)
