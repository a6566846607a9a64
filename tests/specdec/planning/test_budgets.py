"""Expected tokens by family and nodes."""

import pytest

from specdec.planning.budgets import expected_by_budget
from specdec.planning.theory import expected_tokens_per_round, expected_tree_tokens
from specdec.planning.tree_search import optimal_tree


def test_families_are_what_theory_says():
    ranks = [0.6, 0.2, 0.05]
    found = expected_by_budget(ranks, (2, 5, 9))
    assert found["chain"] == {n: pytest.approx(expected_tokens_per_round(0.6, n - 1)) for n in (2, 5, 9)}
    assert found["2-ary tree"] == {3: pytest.approx(1.8), 7: pytest.approx(1 + 0.8 + 0.64)}
    assert found["3-ary tree"] == {4: pytest.approx(1.85)}
    for size, tokens in found["best tree"].items():
        assert tokens == pytest.approx(expected_tree_tokens(optimal_tree(ranks, size), [ranks]))


def test_without_a_second_rank_there_are_no_wider_trees():
    assert expected_by_budget([0.5], (2, 4)).keys() == {"chain", "best tree"}
