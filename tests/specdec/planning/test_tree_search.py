"""The best tree against all trees there are, and against the greedy one; hardware-aware choices against a search over
all of them.
"""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.planning.costs import Costs
from specdec.planning.theory import expected_tokens_per_round, expected_tree_tokens, optimal_length, reach
from specdec.planning.tree_search import greedy_tree, optimal_tree
from specdec.trees.tree import TokenTree

FLAT = Costs(0.01, 0.1, (1, 64), (1.0, 1.63))  # 0.01 a node


def tree_speedup(tree, acceptance, costs):
    """Expected tokens per round over the round's cost."""
    return expected_tree_tokens(tree, acceptance) / (tree.max_depth * costs.draft + costs.verify_at(tree.size))


def falling(ranks):
    return st.lists(st.floats(0.01, 1.0), min_size=1, max_size=ranks).map(
        lambda xs: [x / max(1.0, sum(xs)) for x in sorted(xs, reverse=True)]
    )


def every_tree(size):
    """All ordered trees of `size` nodes."""
    trees = {TokenTree((None, *parents)) for parents in product(*(range(n) for n in range(1, size)))}
    return {TokenTree.from_choices(tree.choices) for tree in trees}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(falling(3), st.integers(1, 6), st.integers(0, 5))
def test_no_tree_of_that_size_and_depth_expects_more(acceptance, size, depth):
    best = optimal_tree(acceptance, size, depth)
    assert best.size <= size and best.max_depth <= depth
    others = [tree for n in range(1, size + 1) for tree in every_tree(n) if tree.max_depth <= depth]
    assert expected_tree_tokens(best, [acceptance]) == pytest.approx(
        max(expected_tree_tokens(tree, [acceptance]) for tree in others)
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(falling(4), st.integers(1, 14), st.integers(1, 6))
def test_growing_by_value_finds_the_same_expectation(acceptance, size, depth):
    grown, best = greedy_tree([acceptance] * depth, size), optimal_tree(acceptance, size, depth)
    assert expected_tree_tokens(grown, [acceptance]) == pytest.approx(expected_tree_tokens(best, [acceptance]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(falling(3), min_size=1, max_size=3), st.integers(1, 6))
def test_growing_is_best_with_accuracies_that_differ_by_depth(acceptance, size):
    grown = greedy_tree(acceptance, size)
    others = [tree for n in range(1, size + 1) for tree in every_tree(n) if tree.max_depth <= len(acceptance)]
    assert expected_tree_tokens(grown, acceptance) == pytest.approx(
        max(expected_tree_tokens(tree, acceptance) for tree in others)
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(falling(3), st.floats(0.0, 0.5), st.floats(0.0, 0.2))
def test_with_costs_no_smaller_or_shallower_tree_is_faster(acceptance, draft, node):
    costs = Costs(0.01, draft, (1, 2), (1.0, 1.0 + node))
    best = optimal_tree(acceptance, 6, costs=costs)
    others = [tree_speedup(tree, [acceptance], costs) for n in range(2, 7) for tree in every_tree(n)]
    found = 1.0 if best.size == 1 else tree_speedup(best, [acceptance], costs)
    assert found == pytest.approx(max(1.0, *others))


def test_a_round_costs_its_draft_steps_and_its_verification():
    assert round(tree_speedup(TokenTree.chain(3), [[0.8]], Costs(0.01, 0.1, (1, 4), (1.0, 1.2))), 3) == 1.968


def test_one_rank_gives_a_chain_of_the_best_length():
    for alpha in (0.3, 0.6, 0.9):
        tree = optimal_tree([alpha], 30, costs=Costs(0.01, 0.1, (1, 2), (1.0, 1.0)))
        assert tree == TokenTree.chain(optimal_length(alpha, 0.1))


def test_a_hopeless_drafter_gets_no_tree():
    assert optimal_tree([0.02], 16, costs=FLAT).size == 1 and optimal_length(0.05, 0.3) == 0


def test_reach_is_the_product_along_the_path():
    tree = TokenTree.from_widths((2, 2))
    assert reach(tree, [[0.5, 0.2], [0.4, 0.1]]) == pytest.approx([1, 0.5, 0.2, 0.2, 0.05, 0.08, 0.02])
    assert expected_tree_tokens(TokenTree.chain(5), [[0.7]]) == pytest.approx(expected_tokens_per_round(0.7, 5))


@pytest.mark.parametrize("bad", [[], [1.2], [-0.1], [0.7, 0.6], [float("nan")]])
def test_acceptance_that_is_no_distribution_over_ranks_is_refused(bad):
    for call in (
        lambda: optimal_tree(bad, 4),
        lambda: greedy_tree([bad], 4),
        lambda: expected_tree_tokens(TokenTree.chain(1), [bad]),
    ):
        with pytest.raises(ValueError, match="sum to at most 1"):
            call()


def test_rising_acceptance_and_sizes_below_one_are_refused():
    for call in (lambda: optimal_tree([0.2, 0.5], 4), lambda: greedy_tree([[0.2, 0.5]], 4)):
        with pytest.raises(ValueError, match="fall"):
            call()
    for call in (lambda: optimal_tree([0.5], 0), lambda: greedy_tree([[0.5]], 0), lambda: optimal_tree([0.5], 3, -1)):
        with pytest.raises(ValueError, match="at least"):
            call()


def test_costs_lie_on_the_line_between_measured_sizes():
    costs = Costs(0.01, 0.1, (1, 4, 8), (1.0, 1.6, 2.0))
    assert [costs.verify_at(n) for n in (1, 2, 4, 6, 8, 12)] == pytest.approx([1.0, 1.2, 1.6, 1.8, 2.0, 2.4])
    assert Costs(0.01, 0.0, (1,), (1.0,)).verify_at(9) == 1.0
    with pytest.raises(ValueError, match="at least one token"):
        costs.verify_at(0)
    with pytest.raises(ValueError, match="sizes must rise"):
        Costs(0.01, 0.1, (4, 1), (1.0, 1.0))


def test_large_trees_are_found_without_deep_recursion():
    assert (
        optimal_tree([0.9], 400, max_depth=20).max_depth == 20
        and optimal_tree([0.6, 0.2], 150, max_depth=6).size == 127
    )
