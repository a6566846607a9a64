"""What chains, k-ary trees and the best trees are expected to bring for the nodes that they spend."""

from collections.abc import Sequence

from specdec.planning.theory import expected_tree_tokens
from specdec.planning.tree_search import greedy_tree
from specdec.trees.tree import TokenTree

BUDGETS = (2, 4, 8, 16, 32, 64)  # nodes, the root included
ARITIES = (2, 3)
CHAIN, BEST = "chain", "best tree"


def expected_by_budget(acceptance: Sequence[float], budgets: Sequence[int] = BUDGETS) -> dict[str, dict[int, float]]:
    """Expected tokens per round by family and nodes if the child of rank r is accepted with `acceptance[r]`.

    Full k-ary trees have only some sizes. The acceptance is the same at every depth, so that the greedy tree is the
    best one of its size (Chen et al. 2024, Sequoia, section 3.1). Raises ValueError for what `greedy_tree` refuses.

    >>> found = expected_by_budget([0.5, 0.25], [3, 7])
    >>> found["chain"][3], found["2-ary tree"][3], found["best tree"][3]
    (1.75, 1.75, 1.75)
    >>> found["best tree"][7] > max(found["chain"][7], found["2-ary tree"][7])
    True
    """
    trees = {CHAIN: [TokenTree.chain(size - 1) for size in budgets]}
    for arity in ARITIES[: max(0, len(acceptance) - 1)]:
        deep = [TokenTree.kary(arity, depth) for depth in range(1, max(budgets).bit_length() + 1)]
        trees[f"{arity}-ary tree"] = [tree for tree in deep if tree.size <= max(budgets)]
    trees[BEST] = [greedy_tree([acceptance] * (size - 1), size) for size in budgets]
    return {
        name: {tree.size: expected_tree_tokens(tree, [acceptance]) for tree in of} for name, of in trees.items() if of
    }
