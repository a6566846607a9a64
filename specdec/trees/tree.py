"""Token trees: the topology of a draft, whose tokens and probabilities are in `Draft`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from attention.paged.batch import ancestor_bits


@dataclass(frozen=True)
class TokenTree:
    """Parents of N nodes. Node 0 is the last accepted token (parent None); a parent comes before its children.

    Immutable and hashable. Raises ValueError, naming the node, for parents that are not a tree in this order.

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
            if not isinstance(parent, int) or isinstance(parent, bool) or not 0 <= parent < node:
                raise ValueError(f"the parent of node {node} must be an earlier node, got {parent}")

    @classmethod
    def chain(cls, length: int) -> "TokenTree":
        """The root and `length` drafted tokens in a row."""
        if length < 0:
            raise ValueError(f"a chain has length >= 0, got {length}")
        return cls((None, *range(length)))

    @classmethod
    def from_widths(cls, widths: Sequence[int]) -> "TokenTree":
        """The tree in which every node at depth d has `widths[d]` children, level by level.

        Source: the expansion configuration of Miao et al. 2024 (SpecInfer).

        >>> TokenTree.from_widths((2, 1)).parents
        (None, 0, 0, 1, 2)
        """
        if any(not isinstance(width, int) or width < 1 for width in widths):
            raise ValueError(f"widths must be integers of at least 1, got {tuple(widths)}")
        parents: list[int | None] = [None]
        level = [0]
        for width in widths:
            below = [parent for parent in level for _ in range(width)]
            level = list(range(len(parents), len(parents) + len(below)))
            parents += below
        return cls(tuple(parents))

    @classmethod
    def kary(cls, arity: int, depth: int) -> "TokenTree":
        """The full tree in which every node above `depth` has `arity` children."""
        if depth < 0:
            raise ValueError(f"a tree has depth >= 0, got {depth}")
        return cls.from_widths((arity,) * depth)

    @classmethod
    def from_choices(cls, choices: Sequence[Sequence[int]]) -> "TokenTree":
        """The tree of Medusa-style paths of ranks: (0, 1) is the second most likely token after the most likely one.

        Nodes are ordered by length, then by path, as in Medusa's own buffers (Cai et al. 2024). Raises ValueError for
        an empty or repeated path, for one whose parent is missing, for a rank without the ranks before it (a node's
        rank is its place among its siblings), and for numbers of choices at each depth, which `from_widths` takes.

        >>> TokenTree.from_choices([[0], [1], [0, 0], [0, 1], [1, 0]]).parents
        (None, 0, 0, 1, 1, 2)
        """
        if isinstance(choices, Sequence) and choices and all(isinstance(count, int) for count in choices):
            widths = tuple(choices[1:] if choices[0] == 1 else choices)
            raise ValueError(
                f"choices are paths of ranks such as (0,) and (0, 1), got {list(choices)}, the numbers of choices at "
                f"each depth in the format of medusa-llm 0.1: TokenTree.from_widths({widths}) makes that tree"
            )
        paths = sorted((tuple(path) for path in choices), key=lambda path: (len(path), path))
        node: dict[tuple[int, ...], int] = {(): 0}
        parents: list[int | None] = [None]
        for path in paths:
            if not path or path in node:
                raise ValueError(f"choices hold {'an empty path' if not path else f'the path {path} twice'}")
            if path[:-1] not in node:
                raise ValueError(f"the path {path} has no parent {path[:-1]} among the choices")
            if path[-1] != 0 and (*path[:-1], path[-1] - 1) not in node:
                raise ValueError(f"the path {path} has no sibling of rank {path[-1] - 1} before it")
            node[path] = len(parents)
            parents.append(node[path[:-1]])
        return cls(tuple(parents))

    @property
    def static(self) -> "TokenTree":
        """Itself: a tree that all rows share and that the host knows (None for a `TreeBatch`)."""
        return self

    @property
    def size(self) -> int:
        """N, the root included."""
        return len(self.parents)

    @cached_property
    def above(self) -> tuple[int, ...]:
        """Per node its parent; 0 for the root."""
        return tuple(parent or 0 for parent in self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node; the root has 0."""
        depths = [0]
        for parent in self.above[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node."""
        return max(self.depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Per node its children in order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.above[1:], 1):
            children[parent].append(node)
        return tuple(tuple(nodes) for nodes in children)

    @property
    def max_children(self) -> int:
        """The most children of any node."""
        return max(map(len, self.children))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Per node its place among its siblings, from 0; the root has 0."""
        ranks = [0] * self.size
        for nodes in self.children:
            for rank, node in enumerate(nodes):
                ranks[node] = rank
        return tuple(ranks)

    @cached_property
    def internal(self) -> tuple[int, ...]:
        """The nodes with children, in increasing order."""
        return tuple(node for node, nodes in enumerate(self.children) if nodes)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The nodes at each depth."""
        nodes, levels = range(self.size), range(self.max_depth + 1)
        return tuple(tuple(node for node in nodes if self.depths[node] == level) for level in levels)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node has at most one child."""
        return self.parents[1:] == tuple(range(self.size - 1))

    @cached_property
    def bits(self) -> tuple[tuple[int, ...], ...]:
        """Per node, the int64 words whose set bits are its ancestors and itself."""
        return tuple(tuple(words) for words in ancestor_bits(self.parents))

    @property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """Per node below the root its path of ranks, as `from_choices` takes them."""
        return tuple(tuple(self.ranks[n] for n in self.path(node)) for node in range(1, self.size))

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes = []
        while node != 0:
            nodes.append(node)
            node = self.above[node]
        return tuple(reversed(nodes))

    def by_level(self) -> "TokenTree":
        """The same tree with its nodes ordered by depth, as a model drafts them."""
        return self if list(self.depths) == sorted(self.depths) else TokenTree.from_choices(self.choices)

    def plot(self, expected: Sequence[float] | None = None, measured: Sequence[float] | None = None,
             labels: Sequence[str] | None = None):  # fmt: skip
        """Draw the tree beside its mask and return the figure; see `specdec.trees.plot.plot_tree`."""
        from specdec.trees.plot import plot_tree

        return plot_tree(self, expected, measured, labels)


def require_width(tree: TokenTree, vocab_size: int) -> None:
    """Raise ValueError for a node with more children than there are tokens."""
    if tree.max_children > vocab_size:
        raise ValueError(
            f"a node with {tree.max_children} children needs as many different tokens, but the vocabulary has "
            f"{vocab_size}"
        )


def tree_to_draft(num_tokens: int, tree: TokenTree | None) -> TokenTree:
    """A chain of `num_tokens`, or `tree`, level by level. Raises ValueError for the root alone."""
    drafted = (TokenTree.chain(num_tokens) if tree is None else tree).by_level()
    if drafted.size < 2:
        raise ValueError("a tree to draft has at least one node below the root, got the root alone")
    return drafted


def require_length(num_tokens: int) -> None:
    """Raise ValueError for a draft length that is no integer of at least 1."""
    if type(num_tokens) is not int or num_tokens < 1:
        raise ValueError(f"num_tokens (the draft length γ) must be an integer of at least 1, got {num_tokens!r}")
