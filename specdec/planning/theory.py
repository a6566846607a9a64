"""Expected gains of speculative decoding in closed form.

Source: Leviathan et al. 2023, section 3; Chen et al. 2024 (Sequoia), section 3."""

from collections.abc import Sequence

from specdec.trees.tree import TokenTree


def expected_tokens_per_round(alpha: float, length: int) -> float:
    """E[tokens per round] of a chain of `length` tokens, each accepted with probability `alpha`; with the bonus token.

    >>> round(expected_tokens_per_round(0.8, 5), 3)
    3.689
    """
    if not 0 <= alpha <= 1 or length < 0:
        raise ValueError(f"alpha must lie in [0, 1] and length be >= 0, got {alpha} and {length}")
    return sum(alpha**i for i in range(length + 1))


def expected_speedup(alpha: float, length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Tokens per round over the round's cost, both costs in units of one autoregressive step of the target.

    >>> round(expected_speedup(0.8, 8, 0.05), 2)
    3.09
    """
    if draft_cost < 0 or verify_cost <= 0:
        raise ValueError(f"draft_cost must be >= 0 and verify_cost > 0, got {draft_cost} and {verify_cost}")
    return expected_tokens_per_round(alpha, length) / (length * draft_cost + verify_cost)


def optimal_length(alpha: float, draft_cost: float, verify_cost: float = 1.0, max_length: int = 64) -> int:
    """The draft length γ in 0 … `max_length` with the largest expected speedup; 0 where speculation does not pay.

    Of lengths that tie, the smaller is returned. The published optima, with their speedups:

    >>> table = {c: [(a, optimal_length(a, c)) for a in (0.5, 0.6, 0.7, 0.8, 0.9)] for c in (0.05, 0.2)}
    >>> [(n, f"{expected_speedup(a, n, 0.05):.2f}") for a, n in table[0.05]]
    [(3, '1.63'), (4, '1.92'), (6, '2.35'), (8, '3.09'), (13, '4.67')]
    >>> [(n, f"{expected_speedup(a, n, 0.2):.2f}") for a, n in table[0.2]]
    [(1, '1.25'), (2, '1.40'), (3, '1.58'), (4, '1.87'), (7, '2.37')]
    """
    if max_length < 0:
        raise ValueError(f"max_length must be >= 0, got {max_length}")
    best, length = 1.0, 0  # a round without a draft is a plain step
    for tried in range(1, max_length + 1):
        speedup = expected_speedup(alpha, tried, draft_cost, verify_cost)
        if speedup > best + 1e-12:
            best, length = speedup, tried
    return length


def expected_tree_tokens(tree: TokenTree, acceptance: Sequence[Sequence[float]]) -> float:
    """E[tokens per round] of `tree`, with the bonus token.

    The child of rank r at depth d is accepted with probability `acceptance[d - 1][r]`; the last row of `acceptance`
    applies to all greater depths. A node counts if its whole path is accepted, so the expectation is the sum over all
    nodes of the product along their paths.

    >>> round(expected_tree_tokens(TokenTree.from_widths((2, 1)), [[0.6, 0.2]]), 2)
    2.28
    """
    return sum(reach(tree, acceptance))


def reach(tree: TokenTree, acceptance: Sequence[Sequence[float]]) -> list[float]:
    """Per node the probability that it is accepted: the product along its path. The root has 1."""
    require_acceptance(acceptance)
    reached = [1.0]
    for node in range(1, tree.size):
        row, rank, parent = (
            acceptance[min(tree.depths[node], len(acceptance)) - 1],
            tree.ranks[node],
            tree.parents[node],
        )
        reached.append(reached[parent or 0] * (row[rank] if rank < len(row) else 0.0))
    return reached


def require_acceptance(acceptance: Sequence[Sequence[float]]) -> None:
    """Raise ValueError unless every row holds probabilities of exclusive events (one sibling at most is accepted)."""
    for row in acceptance:
        if not row or any(not 0 <= p <= 1 for p in row) or sum(row) > 1 + 1e-9:  # NaN fails the comparison
            raise ValueError(f"acceptance needs rows of probabilities that sum to at most 1, got {list(row)}")
    if not acceptance:
        raise ValueError("acceptance needs at least one row, got none")
