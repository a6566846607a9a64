import dataclasses
import re

import pytest
import torch

from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree

CHAIN, TREE = TokenTree.chain(2), TokenTree((None, 0, 0, 1, 1, 3))  # TREE's internal nodes: 0, 1 and 3


def tokens(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(("tree", "internal"), [(CHAIN, 2), (TREE, 3), (TokenTree.chain(0), 0)])
def test_one_distribution_for_each_internal_node_or_none_at_all(tree, internal):
    assert Draft(tree, tokens(4, tree.size)).probs is None
    assert Draft(tree, tokens(4, tree.size), torch.ones(4, internal, 7)).probs.shape == (4, internal, 7)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 4), (4, 3, 1)])
def test_tokens_of_another_shape_are_refused_and_named(shape):
    with pytest.raises(ValueError, match=re.escape(f"[B, 3], got {list(shape)}")):
        Draft(CHAIN, tokens(*shape))


@pytest.mark.parametrize(("tree", "internal"), [(CHAIN, 2), (TREE, 3)])
@pytest.mark.parametrize("wrong", ["batch", "nodes", "rank", "all nodes"])
def test_probs_of_another_shape_are_refused_and_named(tree, internal, wrong):
    shape = {
        "batch": (1, internal, 7),
        "nodes": (4, internal - 1, 7),
        "rank": (4, internal),
        "all nodes": (4, tree.size, 7),
    }[wrong]
    with pytest.raises(ValueError, match=re.escape(f"[4, {internal}, V], got {list(shape)}")):
        Draft(tree, tokens(4, tree.size), torch.ones(shape))


def test_a_draft_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Draft(CHAIN, tokens(1, 3)).probs = torch.ones(1, 2, 7)
