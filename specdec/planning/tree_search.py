"""Which tree to draft: the one with the most expected tokens for its size, or for the time that its round takes on this
machine.
"""

import heapq
from collections.abc import Callable, Sequence
from functools import cache

from specdec.planning.costs import Costs
from specdec.planning.theory import require_acceptance
from specdec.trees.tree import TokenTree


def optimal_tree(
    acceptance: Sequence[float], size: int, max_depth: int | None = None, costs: Costs | None = None
) -> TokenTree:
    """The best tree of up to `size` nodes, the root included, where the child of rank r is accepted with probability
    `acceptance[r]`.

    F(n, d), the expected tokens of the best tree of n nodes and depth at most d, is 1 + the best way to share n - 1
    nodes among the children: sum_r acceptance[r] F(n_r, d - 1). Without `costs` the tree has `size` nodes. With them
    size and depth are chosen too, so that tokens per time, F(n, d) / (d draft + verify(n)), is largest; the root alone
    where speculation does not pay. Source: Chen et al. 2024 (Sequoia), section 3.1 and, for the costs, section 3.3.
    Raises ValueError for a size below 1 or acceptance that is no list of falling probabilities with a sum of at most 1.

    >>> optimal_tree([0.7, 0.2], 6).parents
    (None, 0, 0, 1, 3, 4)
    """
    require_acceptance([acceptance])
    if list(acceptance) != sorted(acceptance, reverse=True):
        raise ValueError(f"acceptance must fall from rank to rank, got {list(acceptance)}")
    deepest = size - 1 if max_depth is None else min(max_depth, size - 1)
    if size < 1 or (max_depth is not None and max_depth < 0):
        raise ValueError(f"size must be at least 1 and max_depth at least 0, got {size} and {max_depth}")

    @cache
    def best(nodes: int, depth: int) -> tuple[float, tuple[int, ...]]:
        """(expected tokens, nodes under each child) of a tree of at most `nodes` nodes."""
        if nodes == 0:
            return 0.0, ()
        if depth == 0:
            return 1.0, ()
        tokens, split = share(nodes - 1, depth - 1, 0)
        return 1.0 + tokens, split

    @cache
    def share(nodes: int, depth: int, rank: int) -> tuple[float, tuple[int, ...]]:
        """The best way to give `nodes` nodes to the children from `rank` on, each the root of a tree of depth at most
        `depth`.
        """
        if nodes == 0 or rank == len(acceptance):
            return 0.0, ()
        chosen = (0.0, ())
        for first in range(1, nodes + 1):
            rest, split = share(nodes - first, depth, rank + 1)
            tokens = acceptance[rank] * best(first, depth)[0] + rest
            if tokens > chosen[0] + 1e-15:
                chosen = (tokens, (first, *split))
        return chosen

    def paths(nodes: int, depth: int, prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        below = []
        for rank, count in enumerate(best(nodes, depth)[1]):
            below += [(*prefix, rank), *paths(count, depth - 1, (*prefix, rank))]
        return below

    for depth in range(deepest + 1):  # from below, so that no call goes deep
        for nodes in range(size + 1):
            best(nodes, depth)
    if costs is None:
        nodes, depth = size, deepest
    else:
        grid = [(n, d) for n in range(2, size + 1) for d in range(1, min(deepest, n - 1) + 1)]
        speed = {(n, d): best(n, d)[0] / costs.of_round(n, d) for n, d in grid}
        nodes, depth = max(speed, key=speed.__getitem__, default=(1, 0))
        if not speed or speed[nodes, depth] <= 1:
            nodes, depth = 1, 0
    return TokenTree.from_choices(paths(nodes, depth, ()))


def greedy_tree(acceptance: Sequence[Sequence[float]], size: int) -> TokenTree:
    """The tree of up to `size` nodes, the root included, grown by the node of largest value: the product of
    `acceptance` along its path.

    `acceptance[d - 1][r]` belongs to rank r at depth d, so the tree is at most `len(acceptance)` deep: the calibrated
    accuracies of Medusa heads. Source: Cai et al. 2024 (Medusa), section 2.3.3. Since a value never exceeds its
    parent's, no tree of that size expects more.

    >>> greedy_tree([[0.6, 0.3], [0.5, 0.1]], 4).parents
    (None, 0, 0, 1)
    """
    require_acceptance(acceptance)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if any(list(row) != sorted(row, reverse=True) for row in acceptance):
        raise ValueError("acceptance must fall from rank to rank at every depth")
    return TokenTree.from_choices(grow(acceptance, size - 1))


def grow(acceptance: Sequence[Sequence[float]], count: int) -> list[tuple[int, ...]]:
    """The `count` paths of ranks of largest value, largest first, so that every beginning of the list is a greedy tree.
    Checks nothing.
    """
    values = {(): 1.0}

    def value(path: tuple[int, ...]) -> float | None:
        row, rank = acceptance[len(path) - 1] if len(path) <= len(acceptance) else (), path[-1]
        if (
            rank >= len(row) or rank > 0 and row[rank - 1] == 0
        ):  # behind a choice that is never right, there is nothing to be had
            return None
        values[path] = values[path[:-1]] * row[rank]
        return values[path]

    return best_paths(value, count)


def best_paths(value: Callable[[tuple[int, ...]], float | None], count: int) -> list[tuple[int, ...]]:
    """`count` paths of ranks with as much `value` in all as a greedy search finds; None is no path, and no rank behind
    it is one.

    Each path comes after its parent and the sibling of the rank before, so every beginning of the list is a tree.
    Siblings whose values do not fall are taken together, as many at a time as are worth most on average; where all
    fall, from rank to rank and from parent to child, no other tree is worth more."""
    chosen: list[tuple[int, ...]] = []
    frontier: list[tuple[float, tuple[int, ...], int]] = []

    def offer(parent: tuple[int, ...], first: int) -> None:
        """The best run of children of `parent` that begins with rank `first`."""
        total, best, last, rank = 0.0, float("-inf"), first, first
        while (worth := value((*parent, rank))) is not None:
            total += worth
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
