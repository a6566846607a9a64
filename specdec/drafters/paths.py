"""Many guesses made one tree: tokens along paths in, a tree a row out, equal beginnings shared."""

import torch
from torch import Tensor

from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch


def merge_paths(
    root: Tensor, paths: Tensor, depths: Tensor, exists: Tensor, num_tokens: int, max_children: int
) -> Draft:
    """The draft over `num_tokens` nodes that M guessed nodes make, the first ones first.

    `paths [A, M, E]` int64 holds the tokens from depth 1 down to each node (what stands behind is ignored), `depths [A,
    M]` its depth >= 1, `exists [A, M]` whether it is there. Nodes with equal paths are one. A node's beginning comes
    before it, as a node of its own. Rows with fewer nodes lack the rest. `root [A, 1]` is the last accepted token."""
    count, nodes, deepest = paths.shape
    place = torch.arange(deepest, device=paths.device)
    paths = torch.where(place < depths[..., None], paths, -1)
    same = (paths[:, :, None] == paths[:, None]).all(-1) & exists[:, None]  # [A, M, M]: column j holds the same path
    owner = same.long().argmax(2)  # the first of them
    first = exists & (owner == torch.arange(nodes, device=paths.device))
    beginning = torch.where(place < depths[..., None] - 1, paths, -1)
    above = (
        ((beginning[:, :, None] == paths[:, None]).all(-1) & first[:, None]).long().argmax(2)
    )  # [A, M], where depth > 1
    order = (~first).long().sort(dim=1, stable=True).indices[:, :num_tokens]
    if nodes < num_tokens:
        order = torch.nn.functional.pad(order, (0, num_tokens - nodes))
    kept = first.gather(1, order) & (torch.arange(num_tokens, device=paths.device) < nodes)
    rank = first.long().cumsum(1)  # node 0 is the root, the first that is kept node 1
    parent = torch.where(depths > 1, rank.gather(1, above), 0).gather(1, order)
    tokens = paths.gather(2, (depths - 1)[..., None])[..., 0].gather(1, order)
    parents = torch.where(kept, parent, -1)
    tree = TreeBatch(torch.nn.functional.pad(parents, (1, 0), value=-1), deepest, max_children)
    return Draft(tree, torch.cat([root, torch.where(kept, tokens, root)], 1))


def paths_of(draft: Draft) -> tuple[Tensor, Tensor, Tensor]:
    """`(paths [A, N - 1, E], depths, exists)` of a draft's nodes below the root: what `merge_paths` takes."""
    tables, count = draft.tables, len(draft.tokens)
    along = tables.path.expand(count, -1, -1)[:, 1:]  # [A, N - 1, E]
    tokens = draft.tokens.gather(1, along.flatten(1)).view(along.shape)
    return tokens, tables.depth.expand(count, -1)[:, 1:].clamp(min=1), tables.valid.expand(count, -1)[:, 1:]
