"""Index tables of trees on the device, and trees that are made there."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from specdec.trees.tree import TokenTree


@dataclass(frozen=True, slots=True)
class TreeTensors:
    """Index tables on a device: X is 1 (one tree for all rows) or B, E the max depth, K the most children of a node.

    parent [X, N]: 0 for the root
    valid [X, N] bool: nodes that exist
    depth [X, N]
    sees [X, N, N] bool: a node's ancestors and itself
    path [X, N, E]: the nodes from depth 1 down to n, padded with zeros
    children [X, N, K]: padded with zeros
    internal [X, N]: each internal node's place among the internal nodes, 0 for others
    """

    parent: Tensor
    valid: Tensor
    depth: Tensor
    sees: Tensor
    path: Tensor
    children: Tensor
    internal: Tensor

    @property
    def max_depth(self) -> int:
        """E."""
        return self.path.shape[2]

    def bits(self) -> Tensor:
        """`[X, N, W]`: `sees` as int64 words."""
        return as_words(self.sees)


def as_words(bits: Tensor) -> Tensor:
    """`bits [..., N]` bool as int64 words `[..., W]`: bit n % 64 of word n // 64."""
    words = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 64)).unflatten(-1, (-1, 64)).long()
    return (words << torch.arange(64, device=words.device)).sum(-1)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # cached tables outlive the call, and training may read them too
def tree_tensors(tree: TokenTree, device: torch.device) -> TreeTensors:
    """The index tables of `tree`, with X = 1."""
    deepest, widest = tree.max_depth, max(map(len, tree.children))
    paths = [tree.path(node) for node in range(tree.size)]
    sees = [[other == 0 or other in paths[node] for other in range(tree.size)] for node in range(tree.size)]
    internal = [tree.internal.index(node) if node in tree.internal else 0 for node in range(tree.size)]
    padded = lambda rows, width: [(*row, *[0] * (width - len(row))) for row in rows]
    table = lambda rows: torch.tensor(rows, dtype=torch.int64, device=device)[None]
    return TreeTensors(
        parent=table(tree.above),
        valid=torch.ones(1, tree.size, dtype=torch.bool, device=device),
        depth=table(tree.depths),
        sees=torch.tensor([sees], device=device),
        path=table(padded(paths, deepest)),
        children=table(padded(tree.children, widest)),
        internal=table(internal),
    )


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def node_tables(tree: TokenTree, device: torch.device) -> tuple[Tensor, Tensor]:
    """Depths `[1, N]` and ancestor bits `[1, N, W]` of a tree."""
    return torch.tensor([tree.depths], device=device), torch.tensor([tree.bits], device=device)


@dataclass(frozen=True)
class TreeBatch:
    """One tree per row, made on the device.

    parents [B, N] int64: -1 for the root (node 0) and for nodes that a row lacks; parents come before children.
    max_depth, max_children: bounds for all nodes, known on the host because they shape the tables.
    """

    parents: Tensor
    max_depth: int
    max_children: int

    def __post_init__(self):
        if self.parents.ndim != 2 or self.parents.dtype != torch.int64:
            raise ValueError(f"parents must be int64 [B, N], got {self.parents.dtype} {list(self.parents.shape)}")

    @property
    def size(self) -> int:
        """N, the root included; rows may lack some nodes."""
        return self.parents.shape[1]

    @property
    def is_chain(self) -> bool:
        """Always False: whether all rows are chains is known on the device only."""
        return False

    def check(self) -> None:
        """Raise ValueError, naming row and node, for rows that are not trees.

        Waits for the device: for tests and for debugging a drafter."""
        for row, parents in enumerate(self.parents.tolist()):
            nodes = [node for node in range(self.size) if node == 0 or parents[node] >= 0]
            places = {node: place for place, node in enumerate(nodes)}
            for node in nodes:
                if node and (parents[node] not in places or parents[node] >= node):
                    raise ValueError(
                        f"row {row}: the parent of node {node} must be an earlier node that exists, got {parents[node]}"
                    )
            tree = TokenTree(tuple(None if node == 0 else places[parents[node]] for node in nodes))
            depth, children = tree.max_depth, max(map(len, tree.children))
            if depth > self.max_depth or children > self.max_children:
                raise ValueError(
                    f"row {row}: depth {depth} and {children} children exceed {self.max_depth}, {self.max_children}"
                )

    def broken(self) -> Tensor:
        """`[B]` bool: rows that are no trees or deeper than `max_depth`; does not wait for the device."""
        node = torch.arange(self.size, device=self.parents.device)
        exists = (self.parents >= 0) | (node == 0)
        parent = self.parents.clamp(0, self.size - 1)
        wrong = (self.parents >= node) & (node > 0) | exists & ~exists.gather(1, parent)
        above = torch.where(exists, node, 0)
        for _ in range(self.max_depth):
            above = torch.where(above > 0, parent.gather(1, above), 0)
        return (wrong | (above > 0)).any(1)

    def repaired(self) -> "TreeBatch":
        """The same trees, with invalid parents clamped so that indexing stays in bounds."""
        before = torch.arange(self.size, device=self.parents.device) - 1
        return TreeBatch(torch.minimum(self.parents, before), self.max_depth, self.max_children)

    @cached_property
    def tables(self) -> TreeTensors:
        """The index tables, computed on the device."""
        batch, size = self.parents.shape
        device = self.parents.device
        node = torch.arange(size, device=device)
        valid = (self.parents >= 0) | (node == 0)
        parent = self.parents.clamp(min=0)
        sees = torch.eye(size, dtype=torch.bool, device=device).expand(batch, -1, -1)
        upwards, above = [], torch.where(valid, node, 0)
        for _ in range(self.max_depth):
            sees = sees | sees.gather(1, parent[:, :, None].expand(-1, -1, size)) & valid[:, :, None]
            upwards.append(above)
            above = parent.gather(1, above)  # the root is its own parent
        sees = sees | (node == 0)
        depth = torch.where(valid, sees.sum(2) - 1, 0)
        # [B, N, E]: n, its parent, …, 0
        climbed = torch.stack(upwards, 2) if upwards else parent.new_zeros(batch, size, 0)
        place = depth[:, :, None] - 1 - torch.arange(self.max_depth, device=device)
        path = torch.where(place >= 0, climbed.gather(2, place.clamp(0, max(self.max_depth - 1, 0))), 0)
        is_child = (self.parents[:, None, :] == node[:, None]) & valid[:, None, :]  # [B, parent, child]
        order = torch.where(is_child, node, size).sort(2).values[:, :, : self.max_children]
        children, has_children = torch.where(order < size, order, 0), is_child.any(2).long()
        internal = (has_children.cumsum(1) - 1) * has_children
        return TreeTensors(parent, valid, depth, sees, path, children, internal)
