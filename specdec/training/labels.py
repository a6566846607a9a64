"""Which position learns which token."""

import torch
from torch import Tensor

IGNORED = -100  # torch's own mark for positions without a label


def shifted_labels(labels: Tensor, shift: int, documents: Tensor | None = None) -> Tensor:
    """`labels [B, S]` from `shift` places on, IGNORED behind the end: 1 is what the model itself says, head + 2 what a
    head says.

    `documents [B, S]` numbers packed texts; a label of another text than the position's own is IGNORED too. Padding is
    IGNORED by `labels`.

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
    """How many positions of `labels [B, S]` the model and each head learn from: entry 0 for shift 1, entry k + 1 for
    head k.
    """
    return [int((shifted_labels(labels, shift, documents) != IGNORED).sum()) for shift in range(1, num_heads + 2)]
