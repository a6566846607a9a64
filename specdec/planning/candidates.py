"""The shapes among which captured rounds choose: few, since each is captured before it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from specdec.planning.grown_counts import sizes_up_to
from specdec.planning.path_counts import LATER, PathCounts, paths_of
from specdec.planning.policy import DRAFTERS_OWN, Shape, grown_shape, shape_of
from specdec.planning.tree_search import Path, best_paths
from specdec.trees.tree import TokenTree

LENGTHS = (1, 2, 3, 5, 8, 12)  # of chains
LONG_LENGTHS = (16, 20, 24, 32, 48)  # further ones where a pass costs the same for one token or hundreds
SIZES, DEPTHS = (8, 16, 32, 64), (2, 3, 4, 6, 8)  # of trees
MOST_NODES = 512  # of all rows together: more are a loss on any card
MOST_LOGITS = 1 << 26  # numbers in the logits of a round, which a captured one keeps


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a drafter may draft.

    shapes: its `DrafterTraits.shapes`.
    deepest: levels of its deepest tree (None: no limit).
    own: its own tree, if all rows have the same. If that is no chain, trees are the best parts of it.
    vocab_size: of the target.
    largest: nodes of the largest tree that it grows.
    """

    shapes: str
    deepest: int | None = None
    own: TokenTree | None = None
    vocab_size: int = 1
    largest: int = 0

    @property
    def max_tokens(self) -> int:
        """Drafted tokens of the largest shape; 0 where the drafter decides."""
        return {"own": 0, "grown": 0, "chain": LENGTHS[-1]}.get(self.shapes, SIZES[-1] - 1)

    def first(self) -> Shape:
        """What to draft before anything is known."""
        if self.shapes == "grown":
            return grown_shape(min(15, self.largest))
        return DRAFTERS_OWN if self.shapes == "own" else chain(min(3, self._depth(3)))

    def chains(self, rows: int = 1) -> list[Shape]:
        """Chains, or where the drafter takes none its own shape, or trees that it grows and that fit `rows` rows."""
        if self.shapes == "own":
            return [DRAFTERS_OWN]
        if self.shapes == "grown":
            sizes = sizes_up_to(self.largest)
            return [grown_shape(size) for size in sizes if size == sizes[0] or self.fits(size + 1, rows)]
        return [chain(n) for n in LENGTHS if n <= self._depth(n)]

    def trees(self, reached: Callable[[Path], float], rows: int) -> list[Shape]:
        """Trees for `rows` rows with the largest sum of `reached` over their paths, by size and depth."""
        if self.shapes != "tree":
            return []
        sizes = [size for size in SIZES if self.fits(size, rows)]
        whole = None if self.own is None or self.own.is_chain else set(paths_of(self.own))
        found: dict[TokenTree, Shape] = {}
        for limit in dict.fromkeys(map(self._depth, DEPTHS)) if sizes else ():

            def value(path: Path, limit: int = limit) -> float | None:
                if len(path) > limit or path[-1] > len(LATER):
                    return None
                return reached(path) if whole is None or path in whole or not any(path) else None

            grown = best_paths(value, sizes[-1] - 1)
            for size in sizes:
                if size - 1 <= len(grown):
                    tree = TokenTree.from_choices(grown[: size - 1])
                    found[tree] = shape_of(tree)
        return [shape for tree, shape in found.items() if not tree.is_chain]

    def scout(self, reached: Callable[[Path], float], rows: int) -> Shape | None:
        """The tree of `trees` that tells most of the others: of the largest the deepest; None: there are no trees."""
        size = lambda shape: (0, 0) if shape.tree is None else (shape.tree.size, shape.tree.max_depth)
        return max(self.trees(reached, rows), key=size, default=None)

    def fits(self, size: int, rows: int) -> bool:
        """Whether a tree of `size` nodes is small enough for `rows` rows."""
        return size * rows <= most_nodes(self.vocab_size)

    def _depth(self, wanted: int) -> int:
        return wanted if self.deepest is None else min(wanted, self.deepest)


def most_nodes(vocab_size: int) -> int:
    """Nodes of the trees of all rows together, up to which they are considered."""
    return min(MOST_NODES, MOST_LOGITS // vocab_size)


def shapes_under_load(shapes: str, own: TokenTree | None, deepest: int, levels: float = 0,
                      largest: int = 0) -> list[Shape]:  # fmt: skip
    """What a drafter may draft where requests are many: its own shape, then shorter chains and parts of its tree.

    shapes, own: see `Candidates`; deepest: levels of its own shape.
    levels: of the deepest draft where a pass costs the same for one token or hundreds; longer chains than its own and
        larger trees follow there (0: elsewhere, they do not).
    largest: nodes of the largest tree that it grows."""
    if shapes == "own":
        return [DRAFTERS_OWN]
    if shapes == "grown":
        return [grown_shape(size) for size in reversed(sizes_up_to(largest))]
    found = [chain(deepest) if own is None else shape_of(own), *(chain(n) for n in LENGTHS if n <= deepest)]
    if shapes == "tree" and own is not None and not own.is_chain:
        whole, reached = set(paths_of(own)), PathCounts().reach()
        grown = best_paths(lambda path: reached(path) if path in whole else None, SIZES[-1] - 1)
        found += [shape_of(TokenTree.from_choices(grown[: size - 1])) for size in SIZES if size < own.size]
    found += [chain(n) for n in (*LENGTHS, *LONG_LENGTHS) if deepest < n <= levels]
    if shapes == "tree" and levels and (own is None or own.is_chain):
        reached = PathCounts().reach()
        within = lambda path: len(path) <= levels and path[-1] <= len(LATER)
        grown = best_paths(lambda path: reached(path) if within(path) else None, SIZES[-1] - 1)
        found += [shape_of(TokenTree.from_choices(grown[: size - 1])) for size in SIZES]
    return list(dict.fromkeys(found))


@cache
def chain(length: int) -> Shape:
    """A chain of so many drafted tokens."""
    return shape_of(TokenTree.chain(length))
