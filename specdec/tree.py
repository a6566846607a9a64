"""Token trees: the topology of a draft. Topology only; tokens and probabilities live in `Draft`."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from attention.batch import ancestor_bits


@dataclass(frozen=True)
class TokenTree:
    """Parents of N nodes. Node 0 is the last accepted token (parent None); a parent comes before its children.

    >>> tree = TokenTree.chain(2)
    >>> tree.parents, tree.depths, tree.size
    ((None, 0, 1), (0, 1, 2), 3)
    """

    parents: tuple[int | None, ...]

    def __post_init__(self):
        object.__setattr__(self, "parents", tuple(self.parents))
        if not self.parents or self.parents[0] is not None:
            raise ValueError(f"node 0 is the root and has parent None, got parents {self.parents}")
        for node, parent in enumerate(self.parents[1:], 1):
            if not isinstance(parent, int) or not 0 <= parent < node:
                raise ValueError(f"the parent of node {node} must be an earlier node, got {parent}")

    @classmethod
    def chain(cls, length: int) -> "TokenTree":
        """The root and `length` drafted tokens in a row."""
        if length < 0:
            raise ValueError(f"a chain has length >= 0, got {length}")
        return cls((None, *range(length)))

    @property
    def size(self) -> int:
        """N, the root included."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node; the root has 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node has at most one child."""
        return self.parents[1:] == tuple(range(self.size - 1))

    @cached_property
    def bits(self) -> tuple[tuple[int, ...], ...]:
        """Per node, the int64 words whose set bits are its ancestors and itself."""
        return tuple(tuple(words) for words in ancestor_bits(self.parents))

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes = []
        while node != 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))


@dataclass(frozen=True, slots=True)
class TreeTensors:
    """A tree's index tables on a device, E = max depth: `parent [N - 1]` of nodes 1…, `sees [N, N]` bool, `depth [N]`, `path [N, E]`."""

    parent: Tensor
    sees: Tensor
    depth: Tensor
    path: Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # cached tables outlive the call that makes them, and training may read them too
def tree_tensors(tree: TokenTree, device: torch.device) -> TreeTensors:
    """The index tables of `tree`; `path[n]` lists the nodes from depth 1 down to n and is padded with zeros."""
    deepest = max(tree.depths)
    paths = [tree.path(node) for node in range(tree.size)]
    sees = [[other == 0 or other in paths[node] for other in range(tree.size)] for node in range(tree.size)]
    return TreeTensors(
        parent=torch.tensor(tree.parents[1:], dtype=torch.int64, device=device),
        sees=torch.tensor(sees, device=device),
        depth=torch.tensor(tree.depths, device=device),
        path=torch.tensor([(*p, *[0] * (deepest - len(p))) for p in paths], dtype=torch.int64, device=device),
    )
