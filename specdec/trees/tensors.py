"""Trees on the device: what forwards and acceptance rules read of them, and trees that are made there."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from attention.dispatch import resolve
from specdec.cuda_graph import keep_alive
from specdec.trees.tree import TokenTree


@dataclass(frozen=True, slots=True)
class TreeMask:
    """What a forward reads of the trees that its rows end with, in whatever form they were given.

    static: the tree of all rows, which the host knows
    tensors: depths `[B, N]` and ancestor bits `[B, N, W]` (`as_words`) of trees that only the device knows
    parts: masks of rows that follow each other, and how many rows have each

    All are empty for chains, which causal attention verifies.
    """

    static: TokenTree | None = None
    tensors: tuple[Tensor, Tensor] | None = None
    parts: tuple[tuple["TreeMask", int], ...] = ()

    @classmethod
    def join(cls, parts: Sequence[tuple["TreeMask", int]]) -> "TreeMask":
        """The mask of the rows of all `parts`, masks with their numbers of rows, one part after the other."""
        if len(parts) == 1 or not any(mask.size for mask, _ in parts):
            return parts[0][0] if parts else cls()
        return cls(parts=tuple(parts))

    @classmethod
    def of(cls, tree: "Tree") -> "TreeMask":
        """The mask of trees in any form. Raises TypeError for what is no tree."""
        match tree:
            case None:
                return cls()
            case TokenTree():
                return cls(None if tree.is_chain else tree)
            case TreeBatch():
                return cls(tensors=(tree.tables.depth, tree.tables.words))
            case TreeMask():
                return tree
        raise TypeError(f"a tree is a TokenTree, a TreeBatch, a TreeMask or None, got {tree!r}")

    @property
    def size(self) -> int:
        """N, the root included; 0 for chains."""
        if self.static is not None:
            return self.static.size
        if self.parts:
            return max(mask.size for mask, _ in self.parts)
        return 0 if self.tensors is None else self.tensors[0].shape[1]

    def of_rows(self, count: int) -> list | None:
        """For `build_batch`: depths and ancestor bits of each of `count` rows; None for chains."""
        if self.parts:
            return [tree for mask, rows in self.parts for tree in mask.of_rows(rows) or [None] * rows]
        if self.tensors is not None:
            return list(zip(*self.tensors, strict=True))
        return None if self.static is None else [(self.static.depths, self.static.bits)] * count

    def to(self, device: torch.device) -> "TreeMask":
        """The same with its tensors on `device`."""
        if self.parts:
            return TreeMask(parts=tuple((mask.to(device), rows) for mask, rows in self.parts))
        return (
            self if self.tensors is None else TreeMask(tensors=(self.tensors[0].to(device), self.tensors[1].to(device)))
        )

    def on_device(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Depths `[X, N]` and ancestor bits `[X, N, W]`, where X is 1 or B; None for chains."""
        return self.tensors if self.static is None else keep_alive(node_tables(self.static, device))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # cached tables outlive the call, and training may read them too
def node_tables(tree: TokenTree, device: torch.device) -> tuple[Tensor, Tensor]:
    """Depths `[1, N]` and ancestor bits `[1, N, W]` of a tree."""
    return torch.tensor([tree.depths], device=device), torch.tensor([tree.bits], device=device)


def as_words(bits: Tensor) -> Tensor:
    """`bits [..., N]` bool as int64 words `[..., W]`: bit n % 64 of word n // 64."""
    words = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 64)).unflatten(-1, (-1, 64)).long()
    return (words << torch.arange(64, device=words.device)).sum(-1)


@dataclass(frozen=True, slots=True)
class TreeTensors:
    """Index tables on a device: X is 1 (one tree for all rows) or B, E the max depth, K the most children of a node.

    parent [X, N]: 0 for the root
    valid [X, N] bool: nodes that exist
    depth [X, N]
    sees [X, N, N] bool: a node's ancestors and itself
    words [X, N, W]: the same as bits, see `as_words`
    path [X, N, E]: the nodes from depth 1 down to n, padded with zeros
    children [X, N, K]: padded with zeros
    internal [X, N]: each internal node's place among the internal nodes, 0 for others
    """

    parent: Tensor
    valid: Tensor
    depth: Tensor
    sees: Tensor
    words: Tensor
    path: Tensor
    children: Tensor
    internal: Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def tree_tensors(tree: TokenTree, device: torch.device) -> TreeTensors:
    """The index tables of `tree`, with X = 1; made on the host, whose copies any stream of the device may read."""
    parents = torch.tensor([[-1, *tree.above[1:]]], device="cpu")
    tables = TreeBatch(parents, tree.max_depth, tree.max_children).tables
    return TreeTensors(*(getattr(tables, field.name).to(device) for field in fields(tables)))


@dataclass(frozen=True)
class TreeBatch:
    """One tree per row, made on the device.

    parents [B, N] int64: -1 for the root (node 0) and for nodes that a row lacks; parents come before children.
    max_depth, max_children: bounds for all nodes, known on the host because they shape the tables.
    """

    parents: Tensor
    max_depth: int
    max_children: int

    static = None  # the host does not know the trees
    is_chain = False  # nor whether all rows are chains

    def __post_init__(self):
        if self.parents.ndim != 2 or self.parents.dtype != torch.int64:
            raise ValueError(f"parents must be int64 [B, N], got {self.parents.dtype} {list(self.parents.shape)}")

    @property
    def size(self) -> int:
        """N, the root included; rows may lack some nodes."""
        return self.parents.shape[1]

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
            if tree.max_depth > self.max_depth or tree.max_children > self.max_children:
                raise ValueError(
                    f"row {row}: depth {tree.max_depth} and {tree.max_children} children exceed {self.max_depth}, "
                    f"{self.max_children}"
                )

    def broken(self) -> Tensor:
        """`[B]` bool: rows that are no trees or deeper than `max_depth`; does not wait for the device."""
        found = self._by_kernel
        return broken(self.parents, self.max_depth) if found is None else found[1]

    @cached_property
    def tables(self) -> TreeTensors:
        """The index tables, computed on the device; parents of broken trees are clamped, so that indices are valid."""
        found = self._by_kernel
        return tables_of(self.parents, self.max_depth, self.max_children) if found is None else found[0]

    @cached_property
    def _by_kernel(self) -> tuple[TreeTensors, Tensor] | None:
        """What one launch gives; None where PyTorch is to run."""
        if resolve(None, self.parents.device) == "reference":
            return None
        from specdec.trees.tables_kernel import launch_tables

        *tables, broken_rows = launch_tables(self.parents, self.max_depth, self.max_children)
        return TreeTensors(*tables), broken_rows


def broken(parents: Tensor, max_depth: int) -> Tensor:
    """See `TreeBatch.broken`; `parents [B, N]` are those of a `TreeBatch`."""
    node = torch.arange(parents.shape[1], device=parents.device)
    exists = (parents >= 0) | (node == 0)
    parent = parents.clamp(0, parents.shape[1] - 1)
    wrong = (parents >= node) & (node > 0) | exists & ~exists.gather(1, parent)
    above = torch.where(exists, node, 0)
    for _ in range(max_depth):
        above = torch.where(above > 0, parent.gather(1, above), 0)
    return (wrong | (above > 0)).any(1)


def tables_of(parents: Tensor, max_depth: int, max_children: int) -> TreeTensors:
    """See `TreeBatch.tables`."""
    batch, size = parents.shape
    device = parents.device
    node = torch.arange(size, device=device)
    is_root, parents = node == 0, torch.minimum(parents, node - 1)
    valid, parent = (parents >= 0) | is_root, parents.clamp(min=0)
    sees = torch.eye(size, dtype=torch.bool, device=device).expand(batch, -1, -1)
    upwards, above = [], torch.where(valid, node, 0)
    for _ in range(max_depth):
        sees = sees | sees.gather(1, parent[:, :, None].expand(-1, -1, size)) & valid[:, :, None]
        upwards.append(above)
        above = parent.gather(1, above)  # the root is its own parent
    sees = sees | is_root
    depth = torch.where(valid, sees.sum(2) - 1, 0)
    # [B, N, E]: n, its parent, …, 0
    climbed = torch.stack(upwards, 2) if upwards else parent.new_zeros(batch, size, 0)
    place = depth[:, :, None] - 1 - torch.arange(max_depth, device=device)
    path = torch.where(place >= 0, climbed.gather(2, place.clamp(0, max(max_depth - 1, 0))), 0)
    is_child = (parents[:, None, :] == node[:, None]) & valid[:, None, :]  # [B, parent, child]
    order = torch.where(is_child, node, size).sort(2).values[:, :, :max_children]
    children, has_children = torch.where(order < size, order, 0), is_child.any(2).long()
    internal = (has_children.cumsum(1) - 1) * has_children
    return TreeTensors(parent, valid, depth, sees, as_words(sees), path, children, internal)


Tree = TokenTree | TreeBatch | TreeMask | None  # None: a chain
