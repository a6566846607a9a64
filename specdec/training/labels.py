"""The labels of each position: which token the model, or a head, learns there."""

import torch
from torch import Tensor

IGNORED = -100  # torch's own mark for positions without a label


def shifted_labels(labels: Tensor, shift: int, documents: Tensor | None = None) -> Tensor:
    """`labels [B, S]` from `shift` places on, IGNORED after the end: shift 1 for the model itself, k + 2 for head k.

    `documents [B, S]` numbers packed texts; a label in another text than the position is IGNORED too. Padding is
    IGNORED in `labels` already.

    >>> shifted_labels(torch.tensor([[10, 11, 12, 13, 14]]), 2)
    tensor([[  12,   13,   14, -100, -100]])
    """
    out = torch.full_like(labels, IGNORED)
    room = max(0, labels.shape[1] - shift)
    out[:, :room] = labels[:, shift:]
    if documents is not None:
        same = documents[:, shift:] == documents[:, :room]
        out[:, :room] = torch.where(same, out[:, :room], IGNORED)
    return out


def count_labels(labels: Tensor, num_heads: int, documents: Tensor | None = None) -> list[int]:
    """How many positions of `labels [B, S]` the model (entry 0) and each head k (entry k + 1) learn from."""
    return [int((shifted_labels(labels, shift, documents) != IGNORED).sum()) for shift in range(1, num_heads + 2)]
