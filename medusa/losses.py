"""What Medusa heads are trained on: head k learns the token k + 2 places on (Cai et al. 2024, section 2.2).

    L = sum_k decay^k CE(head_k(h_t), x_(t + k + 2))        decay = 0.8

Logits exist for one chunk of positions and one head at a time: with a vocabulary of 128k, K heads over a batch of tokens would otherwise
take more memory than the model. The backward pass computes each chunk's logits again.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medusa.heads import MedusaHeads

IGNORED = -100  # torch's own mark for positions without a label


def shifted_labels(labels: Tensor, head: int, documents: Tensor | None = None) -> Tensor:
    """What head `head` should say at each position: `labels [B, S]` from head + 2 places on, IGNORED behind the end.

    `documents [B, S]` numbers packed texts; a label of another text than the position's own is IGNORED too.

    >>> shifted_labels(torch.tensor([[10, 11, 12, 13, 14]]), 0)
    tensor([[  12,   13,   14, -100, -100]])
    """
    shift = head + 2
    out = torch.full_like(labels, IGNORED)
    out[:, : max(0, labels.shape[1] - shift)] = labels[:, shift:]
    if documents is not None:
        theirs = torch.full_like(documents, -1)
        theirs[:, : max(0, labels.shape[1] - shift)] = documents[:, shift:]
        out = torch.where(theirs == documents, out, IGNORED)
    return out


def medusa_loss(heads: MedusaHeads, hidden: Tensor, labels: Tensor, lm_head: nn.Module | None = None, documents: Tensor | None = None,
                decay: float = 0.8, chunk: int = 1024) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """`(loss, [mean cross-entropy of each head])` for `hidden [B, S, H]`, which the model's output layer reads, and `labels [B, S]`.

    `labels` are the texts' own tokens, not shifted, IGNORED where a token is not to be learned (the user's part of a chat). `lm_head` is the
    model's output layer for heads that use it. Raises ValueError when no position is left to learn from, or for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    flat, each = hidden.flatten(0, 1), []
    for head in range(heads.config.num_heads):
        wanted = shifted_labels(labels, head, documents).flatten()
        learned = (wanted != IGNORED).nonzero()[:, 0]
        if not len(learned):
            raise ValueError(f"head {head} has nothing to learn: every label of {list(labels.shape)} is masked or lies behind the end of its text")
        total = flat.new_zeros((), dtype=torch.float32)
        for piece in learned.split(chunk):
            total = total + checkpoint(_cross_entropy, heads, head, flat[piece], wanted[piece], lm_head, use_reentrant=False)
        each.append(total / len(learned))
    return sum(decay**head * loss for head, loss in enumerate(each)), each


def _cross_entropy(heads: MedusaHeads, head: int, hidden: Tensor, labels: Tensor, lm_head: nn.Module | None) -> Tensor:
    return nn.functional.cross_entropy(heads.logits(head, hidden, lm_head).float(), labels, reduction="sum")
