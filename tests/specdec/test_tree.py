import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.tree import TokenTree, tree_tensors

CPU = torch.device("cpu")


@st.composite
def parent_lists(draw):
    """Parents of up to 140 nodes: more than two int64 words of ancestor bits."""
    size = draw(st.sampled_from([1, 2, 3, 5, 12, 63, 64, 65, 140]))
    reach = draw(st.sampled_from([1, 3, size]))  # 1 gives a chain, small values give deep trees
    return (None, *(draw(st.integers(max(0, node - reach), node - 1)) for node in range(1, size)))


def ancestors(parents, node):
    """`node` and everything above it, from the root down, by walking up."""
    line = [node]
    while parents[line[-1]] is not None:
        line.append(parents[line[-1]])
    return line[::-1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parent_lists())
def test_everything_derived_from_the_parents_equals_a_walk_up_the_tree(parents):
    tree, size = TokenTree(parents), len(parents)
    lines = [ancestors(parents, node) for node in range(size)]
    assert tree.size == size
    assert tree.depths == tuple(len(line) - 1 for line in lines)
    assert all(tree.path(node) == tuple(lines[node][1:]) for node in range(size))
    assert tree.is_chain == all(parents.count(node) <= 1 for node in range(size))
    for words, line in zip(tree.bits, lines, strict=True):
        assert len(words) == -(-size // 64) and all(-(2**63) <= word < 2**63 for word in words)
        assert [node for node in range(64 * len(words)) if words[node // 64] >> node % 64 & 1] == line

    tables, deepest = tree_tensors(tree, CPU), max(tree.depths)
    assert tables.parent.tolist() == [[0, *parents[1:]]]
    assert tables.depth.tolist() == [list(tree.depths)] and tables.valid.all()
    assert tables.path.shape == (1, size, deepest) and tables.max_depth == deepest
    assert tables.path[0].tolist() == [line[1:] + [0] * (deepest + 1 - len(line)) for line in lines]
    assert tables.sees[0].tolist() == [[other in line for other in range(size)] for line in lines]
    assert tables.bits()[0].tolist() == [list(words) for words in tree.bits]
    children = [[node for node in range(size) if parents[node] == parent] for parent in range(size)]
    assert [list(nodes) for nodes in tree.children] == children
    assert [[node for node in row if node] for row in tables.children[0].tolist()] == children
    assert {tables.parent.dtype, tables.depth.dtype, tables.path.dtype} == {torch.int64} and tables.sees.dtype == torch.bool


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_a_chain_is_a_tree_whose_every_node_follows_the_one_before(length):
    tree = TokenTree.chain(length)
    assert tree.size == length + 1 and tree.is_chain
    assert tree.depths == tuple(range(length + 1))
    assert tree.path(length) == tuple(range(1, length + 1))


def test_a_lone_root_has_empty_tables():
    tables = tree_tensors(TokenTree.chain(0), CPU)
    assert tables.parent.shape == (1, 1) and tables.path.shape == (1, 1, 0) and tables.sees.tolist() == [[[True]]]


def test_two_children_of_one_node_are_no_chain():
    assert not TokenTree((None, 0, 0)).is_chain
    assert not TokenTree((None, 0, 1, 1)).is_chain


def test_equal_trees_are_interchangeable_keys_and_share_their_tables():
    one, other = TokenTree((None, 0, 0, 1)), TokenTree((None, 0, 0, 1))
    assert one == other and hash(one) == hash(other) and len({one, other, TokenTree.chain(3)}) == 2
    assert one.depths == (0, 1, 1, 2)  # a cached property leaves equality and the hash alone
    assert one == other and hash(one) == hash(other)
    assert tree_tensors(one, CPU) is tree_tensors(other, CPU)


@pytest.mark.parametrize("name", ["parents", "depths"])
def test_a_tree_cannot_be_changed(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(TokenTree.chain(2), name, (None, 0, 0))


@pytest.mark.parametrize("parents", [(), (0,), (0, 0), (-1, 0)])
def test_a_root_with_a_parent_is_refused_and_named(parents):
    with pytest.raises(ValueError, match="root") as error:
        TokenTree(parents)
    assert str(parents) in str(error.value)


@pytest.mark.parametrize(("parents", "node", "parent"), [((None, 1), 1, 1), ((None, 2, 0), 1, 2), ((None, 0, -1), 2, -1), ((None, 0, None), 2, None),
                                                          ((None, 0, 1.0), 2, 1.0)])  # fmt: skip
def test_a_parent_that_is_no_earlier_node_is_refused_and_named(parents, node, parent):
    with pytest.raises(ValueError, match=f"node {node} must be an earlier node, got {parent}"):
        TokenTree(parents)


def test_a_negative_length_is_refused_and_named():
    with pytest.raises(ValueError, match="got -1"):
        TokenTree.chain(-1)
