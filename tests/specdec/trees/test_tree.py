import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.trees.tensors import TreeBatch, TreeMask, as_words, tree_tensors
from specdec.trees.tree import TokenTree

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
    assert tables.path.shape == (1, size, deepest)
    assert tables.path[0].tolist() == [line[1:] + [0] * (deepest + 1 - len(line)) for line in lines]
    assert tables.sees[0].tolist() == [[other in line for other in range(size)] for line in lines]
    assert as_words(tables.sees)[0].tolist() == [list(words) for words in tree.bits]
    children = [[node for node in range(size) if parents[node] == parent] for parent in range(size)]
    assert [list(nodes) for nodes in tree.children] == children
    assert [[node for node in row if node] for row in tables.children[0].tolist()] == children
    assert {tables.parent.dtype, tables.depth.dtype, tables.path.dtype} == {
        torch.int64
    } and tables.sees.dtype == torch.bool


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


@pytest.mark.parametrize(
    ("parents", "node", "parent"),
    [
        ((None, 1), 1, 1),
        ((None, 2, 0), 1, 2),
        ((None, 0, -1), 2, -1),
        ((None, 0, None), 2, None),
        ((None, 0, 1.0), 2, 1.0),
    ],
)
def test_a_parent_that_is_no_earlier_node_is_refused_and_named(parents, node, parent):
    with pytest.raises(ValueError, match=f"node {node} must be an earlier node, got {parent}"):
        TokenTree(parents)


def test_a_negative_length_is_refused_and_named():
    with pytest.raises(ValueError, match="got -1"):
        TokenTree.chain(-1)


@pytest.mark.parametrize(
    ("widths", "parents"),
    [((), (None,)), ((3,), (None, 0, 0, 0)), ((2, 2), (None, 0, 0, 1, 1, 2, 2)), ((1, 2), (None, 0, 1, 1))],
)
def test_widths_give_every_node_of_a_level_as_many_children(widths, parents):
    assert TokenTree.from_widths(widths).parents == parents


def test_a_full_tree_and_a_chain_are_trees_of_equal_widths():
    assert (
        TokenTree.kary(2, 3) == TokenTree.from_widths((2, 2, 2))
        and TokenTree.kary(1, 4) == TokenTree.chain(4)
        and TokenTree.kary(5, 0).size == 1
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parent_lists())
def test_choices_name_every_node_and_give_the_tree_back_level_by_level(parents):
    tree = TokenTree(parents)
    leveled = tree.by_level()
    assert list(leveled.depths) == sorted(tree.depths) and sorted(leveled.choices) == sorted(tree.choices)
    assert TokenTree.from_choices(tree.choices) == TokenTree.from_choices(list(reversed(leveled.choices)))
    assert leveled.by_level() is leveled
    assert all(len(path) == depth for path, depth in zip(tree.choices, tree.depths[1:], strict=True))
    assert sum(map(len, tree.levels)) == tree.size and tree.internal == tuple(
        sorted({p for p in parents if p is not None})
    )


@pytest.mark.parametrize(
    ("choices", "said"),
    [([()], "empty path"), ([(0,), (0,)], r"\(0,\) twice"), ([(0, 0)], r"no parent \(0,\)"), ([(1,)], "rank 0 before")],
)
def test_choices_that_are_no_tree_are_refused_by_name(choices, said):
    with pytest.raises(ValueError, match=said):
        TokenTree.from_choices(choices)


@pytest.mark.parametrize(("counts", "widths"), [([1, 7, 6], (7, 6)), ((1, 3), (3,)), ([4, 2], (4, 2))])
def test_counts_of_medusa_llm_are_refused_with_the_call_that_makes_their_tree(counts, widths):
    """Its generate_medusa_buffers makes the whole product, the root being the leading 1: 50 nodes and 42 paths for [1,
    7, 6].
    """
    with pytest.raises(
        ValueError, match=r"medusa-llm 0\.1: TokenTree\.from_widths\(" + re.escape(str(widths))
    ) as caught:
        TokenTree.from_choices(counts)
    assert str(list(counts)) in str(caught.value) and "\n" not in str(caught.value)
    tree = TokenTree.from_widths((7, 6))
    assert tree.size == 50 and sum(not nodes for nodes in tree.children) == 42
    assert TokenTree.from_choices([]).size == 1  # no paths: the root alone


@pytest.mark.parametrize("widths", [(0,), (2, -1), (1.5,)])
def test_widths_below_one_are_refused(widths):
    with pytest.raises(ValueError, match="widths"):
        TokenTree.from_widths(widths)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(parent_lists(), min_size=1, max_size=4), st.data())
def test_trees_of_rows_have_the_tables_of_each_tree_alone(rows, data):
    """Absent nodes anywhere between the others change nothing for those that exist."""
    size = max(map(len, rows)) + data.draw(st.integers(0, 3))
    parents, places = torch.full((len(rows), size), -1), []
    for row, tree in enumerate(rows):
        place = [0, *sorted(data.draw(st.permutations(range(1, size)))[: len(tree) - 1])]
        places.append(place)
        for node, parent in enumerate(tree[1:], 1):
            parents[row, place[node]] = place[parent]
    trees = [TokenTree(tree) for tree in rows]
    batch = TreeBatch(parents, max(tree.max_depth for tree in trees), max(tree.max_children for tree in trees))
    batch.check()
    tables = batch.tables
    assert tables.valid.sum(1).tolist() == [tree.size for tree in trees]
    for row, (tree, place) in enumerate(zip(trees, places, strict=True)):
        alone, here = tree_tensors(tree, CPU), torch.tensor(place)
        assert tables.depth[row, here].tolist() == list(tree.depths)
        assert torch.equal(tables.sees[row][here][:, here], alone.sees[0])
        assert tables.internal[row, here].tolist() == alone.internal[0].tolist()
        for table, one in ((tables.path, alone.path), (tables.children, alone.children)):
            for node in range(tree.size):
                assert [n for n in table[row, place[node]].tolist() if n] == [
                    place[n] for n in one[0, node].tolist() if n
                ]
        absent = [node for node in range(size) if node not in place]
        assert not tables.sees[row][here][:, absent].any() and not tables.depth[row, absent].any()


def test_a_mask_is_the_same_however_the_tree_is_given():
    tree = TokenTree((None, 0, 0, 1, 1, 2))
    static, made = TreeMask.of(tree), TreeMask.of(TreeBatch(torch.tensor([[-1, 0, 0, 1, 1, 2]] * 2), 2, 2))
    assert static.static is tree and made.static is None and static.size == made.size == 6
    assert static.of_rows(2) == [(tree.depths, tree.bits)] * 2 and len(made.of_rows(2)) == 2
    for mine, theirs in zip(static.on_device(CPU), made.on_device(CPU), strict=True):
        assert mine.shape[0] == 1 and theirs.equal(mine.expand_as(theirs))
    assert static.on_device(CPU) is TreeMask.of(TokenTree(tree.parents)).on_device(CPU)  # made once
    assert TreeMask.of(made) is made


@pytest.mark.parametrize("chain", [None, TokenTree.chain(0), TokenTree.chain(4)])
def test_a_chain_needs_no_mask(chain):
    mask = TreeMask.of(chain)
    assert mask == TreeMask() and mask.size == 0 and mask.of_rows(2) is mask.on_device(CPU) is None


def test_what_is_no_tree_has_no_mask():
    with pytest.raises(TypeError, match=re.escape("a TreeBatch, a TreeMask or None, got [None, 0]")):
        TreeMask.of([None, 0])


def test_tables_of_parents_that_are_no_tree_stay_in_bounds():
    """Nodes that come after their children or do not exist at all: the round reports them later."""
    batch = TreeBatch(torch.tensor([[3, 2, 9, 1], [-1, 0, 0, 1]]), 2, 2)
    assert batch.broken().tolist() == [True, False]
    assert batch.tables.parent.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert all(int(table.min()) >= 0 and int(table.max()) < 4 for table in (batch.tables.path, batch.tables.children))
