"""Trees that grow on the device, one for each row: the draft that is made of the nodes found.

The nodes found are lists `[A, C]`, the root first and parents before children: `tokens`, `values` (logarithms of the
draft probability of the path; infinity for the root, -inf for nodes that there are not, and never more than the
parent's) and `parents`, their places in the list (-1 for the root)."""

import torch
from torch import Tensor

from attention.dispatch import resolve
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch

MOST_COMPARED = 4096  # nodes of a row that the kernel compares with each other


def best_tree(tokens: Tensor, values: Tensor, parents: Tensor, size: int, max_depth: int, max_children: int,
              by_value: bool = False, impl: str | None = None) -> Draft:  # fmt: skip
    """The draft of the `size` best nodes, or of all if there are fewer; those of -inf are absent.

    They come in the order of the list, or `by_value`, the best first, so that the first n are the tree of n."""

    def fallback_reason() -> str | None:
        if values.dtype != torch.float32:
            return f"it compares float32 values, got {values.dtype}"
        count = values.shape[1]
        return f"it compares up to {MOST_COMPARED} nodes, got {count}" if count > MOST_COMPARED else None

    size = min(size, values.shape[1])
    if resolve(impl, values.device, fallback_reason) == "triton":
        from specdec.drafters.grown_kernel import launch_choose

        found = tokens.contiguous(), values.contiguous(), parents.contiguous()
        chosen, above = launch_choose(*found, size, by_value)
        return Draft(TreeBatch(above, max_depth, max_children), chosen)
    places = best_places(values, size)
    places = places if by_value else places.sort(1).values
    return Draft(*tree_of(tokens, values, parents, places, max_depth, max_children))


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
