"""The losses of Medusa heads and of a backbone trained with them: head k learns the token k + 2 places on.

    Medusa-1   L = sum_k decay^k CE(head_k(h_t), x_(t + k + 2))       decay = 0.8, backbone frozen
    Medusa-2   L = CE(model(h_t), x_(t + 1)) + weight * L_Medusa-1    on text that the model wrote itself,
               KL(model as it was || model(h_t)) takes the place of the first term (Cai et al. 2024, 2.2 and 2.3)

Logits exist for one chunk of positions and one head at a time (`specdec.training.linear_loss`).
"""

from functools import reduce

import torch
from torch import Tensor, nn

from medusa.heads import MedusaHeads
from specdec.model.output_layer import sizes_of
from specdec.training.labels import IGNORED, count_labels, shifted_labels
from specdec.training.linear_loss import linear_cross_entropy, linear_divergence, positions_at_once


def head_loss(
    heads: MedusaHeads,
    head: int,
    hidden: Tensor,
    labels: Tensor,
    lm_head: nn.Module | None = None,
    documents: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The cross-entropy of one head, a sum over its positions; zero where no position has a label.

    hidden       `[B, S, H]`, as the model's output layer reads it
    labels       `[B, S]`, not shifted, IGNORED where nothing is learned; on the CPU they spare the GPU a wait
    lm_head      the model's output layer, for heads that use it
    documents    `[B, S]`, the numbers of packed texts
    chunk        positions whose logits exist at a time

    Backpropagate one head's loss before computing the next, and one head's gradients are held at a time."""
    places, wanted = _learned(shifted_labels(labels, head + 2, documents), hidden.device)
    state = heads.state(head, hidden.flatten(0, 1)[places])
    chunk = positions_at_once(heads.config.vocab_size) if chunk is None else chunk
    return linear_cross_entropy(
        lambda x: heads.project(head, x, lm_head), state, wanted, heads.output_parameters(head, lm_head), chunk
    )


def medusa_loss(
    heads: MedusaHeads,
    hidden: Tensor,
    labels: Tensor,
    lm_head: nn.Module | None = None,
    documents: Tensor | None = None,
    decay: float = 0.8,
    chunk: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """`(loss, [mean cross-entropy of each head])`; the arguments are those of `head_loss`.

    Raises ValueError where a head has no position to learn from, or for a chunk below 1."""
    counts = count_labels(labels, heads.config.num_heads, documents)[1:]
    if not all(counts):
        head = counts.index(0)
        raise ValueError(
            f"head {head} has nothing to learn: every label of {list(labels.shape)} is masked or lies after the end of "
            "its text"
        )
    loss_of = lambda head: head_loss(heads, head, hidden, labels, lm_head, documents, chunk)
    each = [loss_of(head) / count for head, count in enumerate(counts)]
    return reduce(torch.add, (decay**k * loss for k, loss in enumerate(each))), [loss.detach() for loss in each]


def model_loss(
    lm_head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    documents: Tensor | None = None,
    teacher: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The model's own loss, a sum over positions: cross-entropy, or with `teacher` the divergence KL(p || q).

    q comes from `hidden [B, S, H]`, p from `teacher [B, S, H]`, the hidden states of the model before it was adapted,
    both through `lm_head`."""
    places, wanted = _learned(shifted_labels(labels, 1, documents), hidden.device)
    states, parameters = hidden.flatten(0, 1)[places], [p for p in lm_head.parameters() if p.requires_grad]
    chunk = positions_at_once(sizes_of(lm_head)[0]) if chunk is None else chunk
    if teacher is None:
        return linear_cross_entropy(lm_head, states, wanted, parameters, chunk)
    return linear_divergence(lm_head, states, teacher.flatten(0, 1)[places], parameters, chunk)


def _learned(wanted: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat places `[n]` that have a label, and the labels `[n]`, on `device`."""
    wanted = wanted.flatten()
    places = (wanted != IGNORED).nonzero()[:, 0]
    return places.to(device, non_blocking=True), wanted[places].to(device, non_blocking=True)
