"""Merges guessed continuations into one tree per row, in which equal beginnings share their nodes."""

import torch
from torch import Tensor

from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch


def merge_paths(root: Tensor, paths: Tensor, depths: Tensor, exists: Tensor, num_tokens: int,
                max_children: int) -> Draft:  # fmt: skip
    """The draft of the first `num_tokens` different nodes among M guessed ones; rows with fewer lack the rest.

    root [A, 1]: the last accepted token
    paths [A, M, E] int64: the tokens from depth 1 down to each node; later values are ignored
    depths [A, M]: at least 1; the node one level up must come earlier among the M
    exists [A, M] bool
    """
    count, nodes, deepest = paths.shape
    place = torch.arange(deepest, device=paths.device)
    paths = torch.where(place < depths[..., None], paths, -1)
    same = (paths[:, :, None] == paths[:, None]).all(-1) & exists[:, None]  # [A, M, M]: column j holds the same path
    owner = same.long().argmax(2)  # the first of equal ones
    first = exists & (owner == torch.arange(nodes, device=paths.device))
    beginning = torch.where(place < depths[..., None] - 1, paths, -1)
    is_above = (beginning[:, :, None] == paths[:, None]).all(-1) & first[:, None]
    above = is_above.long().argmax(2)  # [A, M], meaningful where depth > 1
    order = (~first).long().sort(dim=1, stable=True).indices[:, :num_tokens]
    if nodes < num_tokens:
        order = torch.nn.functional.pad(order, (0, num_tokens - nodes))
    kept = first.gather(1, order) & (torch.arange(num_tokens, device=paths.device) < nodes)
    rank = first.long().cumsum(1)  # node 0 is the root, the first guessed node is node 1
    parent = torch.where(depths > 1, rank.gather(1, above), 0).gather(1, order)
    tokens = paths.gather(2, (depths - 1)[..., None])[..., 0].gather(1, order)
    parents = torch.where(kept, parent, -1)
    tree = TreeBatch(torch.nn.functional.pad(parents, (1, 0), value=-1), deepest, max_children)
    return Draft(tree, torch.cat([root, torch.where(kept, tokens, root)], 1))


def paths_of(draft: Draft) -> tuple[Tensor, Tensor, Tensor]:
    """`paths [A, N - 1, E]`, `depths` and `exists` of a draft's nodes below the root, for `merge_paths`."""
    tables, count = draft.tables, len(draft.tokens)
    along = tables.path.expand(count, -1, -1)[:, 1:]  # [A, N - 1, E]
    tokens = draft.tokens.gather(1, along.flatten(1)).view(along.shape)
    return tokens, tables.depth.expand(count, -1)[:, 1:].clamp(min=1), tables.valid.expand(count, -1)[:, 1:]
