"""Search for the draft tree with the most expected tokens, for its size or for the time that its round takes."""

import heapq
from collections.abc import Callable, Sequence
from functools import cache

from specdec.planning.costs import Costs
from specdec.planning.theory import require_acceptance
from specdec.trees.tree import TokenTree

Path = tuple[int, ...]  # the rank of each node from depth 1 on


def optimal_tree(
    acceptance: Sequence[float], size: int, max_depth: int | None = None, costs: Costs | None = None
) -> TokenTree:
    """The best tree of up to `size` nodes (with the root) if the child of rank r is accepted with `acceptance[r]`.

    F(n, d), the expected tokens of the best tree of n nodes and depth at most d, is 1 + the best way to share n - 1
    nodes among the children: sum_r acceptance[r] F(n_r, d - 1). Without `costs` the tree has `size` nodes. With costs,
    size and depth maximise tokens per time, F(n, d) / (d draft + verify(n)); where speculation does not pay, the result
    is the root alone. Source: Chen et al. 2024 (Sequoia), section 3.1 and, for the costs, section 3.3.

    Raises ValueError for a size below 1, or if `acceptance` is not a falling list of probabilities with sum <= 1.

    >>> optimal_tree([0.7, 0.2], 6).parents
    (None, 0, 0, 1, 3, 4)
    """
    require_acceptance([acceptance])
    if list(acceptance) != sorted(acceptance, reverse=True):
        raise ValueError(f"acceptance must fall from rank to rank, got {list(acceptance)}")
    deepest = size - 1 if max_depth is None else min(max_depth, size - 1)
    if size < 1 or (max_depth is not None and max_depth < 0):
        raise ValueError(f"size must be at least 1 and max_depth at least 0, got {size} and {max_depth}")
    best = _best_splits(acceptance)
    for depth in range(deepest + 1):  # fills the table bottom-up, so that recursion stays shallow
        for nodes in range(size + 1):
            best(nodes, depth)
    nodes, depth = size, deepest
    if costs is not None:
        grid = [(n, d) for n in range(2, size + 1) for d in range(1, min(deepest, n - 1) + 1)]
        speed = {(n, d): best(n, d)[0] / costs.of_round(n, d) for n, d in grid}
        nodes, depth = max(speed, key=speed.__getitem__, default=(1, 0))
        if not speed or speed[nodes, depth] <= 1:
            nodes, depth = 1, 0

    def paths(nodes: int, depth: int, prefix: Path) -> list[Path]:
        below = []
        for rank, count in enumerate(best(nodes, depth)[1]):
            below += [(*prefix, rank), *paths(count, depth - 1, (*prefix, rank))]
        return below

    return TokenTree.from_choices(paths(nodes, depth, ()))


def _best_splits(acceptance: Sequence[float]) -> Callable[[int, int], tuple[float, Path]]:
    """The recursion F of `optimal_tree`: (nodes, depth) -> (expected tokens, number of nodes under each child)."""

    @cache
    def best(nodes: int, depth: int) -> tuple[float, Path]:
        if nodes == 0:
            return 0.0, ()
        if depth == 0:
            return 1.0, ()
        tokens, split = share(nodes - 1, depth - 1, 0)
        return 1.0 + tokens, split

    @cache
    def share(nodes: int, depth: int, rank: int) -> tuple[float, Path]:
        """The best split of `nodes` nodes among children of rank >= `rank`, whose trees have depth <= `depth`."""
        chosen: tuple[float, Path] = (0.0, ())
        if nodes == 0 or rank == len(acceptance):
            return chosen
        for first in range(1, nodes + 1):
            rest, split = share(nodes - first, depth, rank + 1)
            tokens = acceptance[rank] * best(first, depth)[0] + rest
            if tokens > chosen[0] + 1e-15:
                chosen = (tokens, (first, *split))
        return chosen

    return best


def greedy_tree(acceptance: Sequence[Sequence[float]], size: int) -> TokenTree:
    """A tree of up to `size` nodes (with the root), grown node by node by largest value.

    A node's value is the product of `acceptance` along its path; `acceptance[d - 1][r]` belongs to rank r at depth d
    (such as the calibrated accuracies of Medusa heads), so the tree is at most `len(acceptance)` deep. As no value
    exceeds its parent's, no tree of that size has more expected tokens. Source: Cai et al. 2024 (Medusa), section
    2.3.3.

    >>> greedy_tree([[0.6, 0.3], [0.5, 0.1]], 4).parents
    (None, 0, 0, 1)
    """
    require_acceptance(acceptance)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if any(list(row) != sorted(row, reverse=True) for row in acceptance):
        raise ValueError("acceptance must fall from rank to rank at every depth")
    return TokenTree.from_choices(grow(acceptance, size - 1))


def grow(acceptance: Sequence[Sequence[float]], count: int) -> list[Path]:
    """The `count` paths of largest value, largest first, so that the first n always form a greedy tree.

    `acceptance` is that of `greedy_tree`; it is not checked."""
    values: dict[Path, float] = {(): 1.0}

    def value(path: Path) -> float | None:
        row, rank = acceptance[len(path) - 1] if len(path) <= len(acceptance) else (), path[-1]
        if rank >= len(row) or rank > 0 and row[rank - 1] == 0:  # nothing to gain after a rank that is never accepted
            return None
        values[path] = values[path[:-1]] * row[rank]
        return values[path]

    return best_paths(value, count)


def best_paths(value: Callable[[Path], float | None], count: int) -> list[Path]:
    """`count` paths with a large total value, found greedily; `value` is None for a path that does not exist.

    If a path does not exist, its later siblings do not either. Each path comes after its parent and its sibling of the
    previous rank, so the first n always form a tree. Siblings whose values do not fall are added together, as many at a
    time as have the largest mean. Where values fall from rank to rank and from parent to child, no other tree has a
    larger total."""
    chosen: list[Path] = []
    frontier: list[tuple[float, Path, int]] = []

    def offer(parent: Path, first: int) -> None:
        """Push the best run of children of `parent` that begins with rank `first`."""
        total, best, last, rank = 0.0, float("-inf"), first, first
        while (gain := value((*parent, rank))) is not None:
            total += gain
            if total / (rank - first + 1) > best:
                best, last = total / (rank - first + 1), rank
            rank += 1
        if rank > first:
            heapq.heappush(frontier, (-best, (*parent, first), last))

    offer((), 0)
    while frontier and len(chosen) < count:
        _, path, last = heapq.heappop(frontier)
        run = [(*path[:-1], rank) for rank in range(path[-1], last + 1)]
        chosen += run
        for other in run:
            offer(other, 0)
        offer(path[:-1], last + 1)
    return chosen[:count]
