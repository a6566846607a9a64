"""Trees that grow on the device, one for each row: the draft that is made of the nodes found.

The nodes found are lists `[A, C]`, the root first and parents before children: `tokens`, `values` (logarithms of the
draft probability of the path; infinity for the root, -inf for nodes that there are not, and never more than the
parent's) and `parents`, their places in the list (-1 for the root)."""

import torch
from torch import Tensor

from specdec.trees.tensors import TreeBatch


def best_places(values: Tensor, size: int) -> Tensor:
    """The places `[A, size]` of the nodes with the largest of `values [A, C]`, in falling order: with their parents.

    Of equal values the first come first, so that a parent, which is in front of its children, never comes after one."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :size]


def tree_of(tokens: Tensor, values: Tensor, parents: Tensor, places: Tensor, max_depth: int,
            max_children: int) -> tuple[TreeBatch, Tensor]:  # fmt: skip
    """The tree of the nodes at `places [A, N]`, in which parents come before children, and its tokens `[A, N]`."""
    count = torch.arange(places.shape[1], device=places.device)
    position = torch.zeros_like(parents).scatter_(1, places, count.expand_as(places))
    above = parents.gather(1, places)
    exists = (above >= 0) & values.gather(1, places).isfinite()
    placed = torch.where(exists, position.gather(1, above.clamp(min=0)), -1)
    return TreeBatch(placed, max_depth, max_children), tokens.gather(1, places)
