"""Accuracies counted by hand, and trees that follow from them."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec
from medusa import MedusaGenerator, MedusaHeads, calibration
from medusa.calibration import HeadRanks, calibrated_tree, head_ranks, reached
from medusa.tiny_heads import load_tiny_heads
from specdec.planning.costs import Costs
from specdec.training.data import Rows, build_rows
from specdec.training.labels import IGNORED
from specdec.trees.tree import TokenTree
from tests.families import VOCAB, build
from tests.matrix import random_heads


def test_ranks_equal_a_count_by_hand():
    model = build("llama")
    heads = random_heads(model, 3)
    texts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14, 4)]
    found = head_ranks(heads, model, texts, choices=40)
    accuracies, paths, begun = found.accuracies(), Counter(), 0
    for head in range(3):
        hits, trials = [0] * 40, 0
        for text in texts:
            with torch.no_grad():
                logits = heads(model.model(text[None]).last_hidden_state[0])
            for t in range(len(text) - head - 2):
                trials += 1
                order = logits[head, t].topk(40).indices.tolist()
                for rank in range(40):
                    hits[rank] += order[rank] == int(text[t + head + 2])
                if head == 2:  # all heads are known here
                    begun += 1
                    orders = [logits[k, t].topk(40).indices.tolist() for k in range(3)]
                    ranks = [
                        order.index(int(text[t + k + 2])) if text[t + k + 2] in order else None
                        for k, order in enumerate(orders)
                    ]
                    paths.update(
                        tuple(ranks[:depth]) for depth in range(1, len(ranks) + 1) if None not in ranks[:depth]
                    )
        assert accuracies[head] == pytest.approx([h / trials for h in hits])
    assert found.path_shares() == pytest.approx({path: count / begun for path, count in paths.items()}) and paths
    assert found.first.nonzero()[:, 0].tolist() == [0, 7, 19]
    assert head_ranks(heads, model, texts).choices == 10
    with pytest.raises(ValueError, match="longer than the 4 tokens"):
        head_ranks(heads, model, [torch.tensor([5, 6])])


def test_a_text_is_first_again_behind_tokens_that_do_not_count():
    """Two packed texts and a row of its own; of the first text some labels in the middle do not count, as where a user
    speaks again.
    """
    model = build("llama")
    tokens = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 11 + [1] * 5, [0] * 16])
    labels = tokens.clone()
    labels[0, 4:8], labels[1, :3] = IGNORED, IGNORED
    found = head_ranks(random_heads(model, 2), model, Rows(tokens, labels, documents), choices=3)

    def counts(row, place):
        """The next token is known, and of those behind it one at least that a head guesses at."""
        inside = lambda at: at < 16 and documents[row, at] == documents[row, place] and labels[row, at] != IGNORED
        return inside(place + 1) and (inside(place + 2) or inside(place + 3))

    places = [(row, place) for row in range(2) for place in range(16) if counts(row, place)]
    begins = [
        place == 0 or documents[row, place - 1] != documents[row, place] or not counts(row, place - 1)
        for row, place in places
    ]
    assert found.first.tolist() == begins and [places[i] for i, one in enumerate(begins) if one] == [
        (0, 0),
        (0, 7),
        (0, 11),
        (1, 2),
    ]


def ranks_of(rows: list[list[int]]) -> HeadRanks:
    """Every position by itself, and known; 4 stands for a token that is not among the choices."""
    return HeadRanks(
        torch.tensor(rows),
        torch.ones(len(rows), len(rows[0]), dtype=torch.bool),
        torch.ones(len(rows), dtype=torch.bool),
        4,
    )


def test_the_tree_counts_whole_paths():
    """Where head 1 is only right when head 0 is, products of accuracies would go wide; paths go deep."""
    together = ranks_of(40 * [[0, 0, 0]] + 12 * [[1, 4, 4]] + 8 * [[2, 4, 4]] + 40 * [[4, 4, 4]])
    tree = calibrated_tree(together, 6)
    assert tree.choices == ((0,), (1,), (2,), (0, 0), (0, 0, 0))
    assert reached(tree, together) == pytest.approx([1.0, 0.4, 0.12, 0.08, 0.4, 0.4])
    assert calibrated_tree(together, 4).choices == ((0,), (0, 0), (0, 0, 0))
    assert calibrated_tree(together, 9).size == 9  # nodes that were never right fill it up


@pytest.mark.parametrize("rows, size, expected", [
    (5 * [[1, 0]] + 5 * [[4, 4]], 4, [(0,), (1,), (1, 0)]),  # the first choice is never right
    ([[0, 4]] + 4 * [[2, 0]] + 5 * [[4, 4]], 5, [(0,), (1,), (2,), (2, 0)]),
    ([[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, 0]], 6, [(0,), (1,), (2,), (2, 0), (2, 0, 0)]),
])  # fmt: skip
def test_ranks_that_are_right_more_often_than_those_before_are_reached(rows, size, expected):
    assert calibrated_tree(ranks_of(rows), size).choices == tuple(expected)


def every_tree(size: int, deepest: int, choices: int) -> set[frozenset]:
    """All sets of paths that form a tree of `size` nodes, the root included."""
    trees = {frozenset()}
    for _ in range(size - 1):
        trees = {
            tree | {path}
            for tree in trees
            for path in (*((*parent, sum(other[:-1] == parent for other in tree)) for parent in ((), *tree)),)
            if len(path) <= deepest and path[-1] < choices
        }
    return trees


@given(
    st.lists(st.lists(st.sampled_from((0, 0, 0, 0, 1, 1, 2)), min_size=3, max_size=3), min_size=1, max_size=40),
    st.integers(2, 6),
)
@settings(max_examples=60)
def test_no_tree_of_that_size_would_have_kept_more_of_the_text(rows, size):
    """Against all trees, where shares fall from rank to rank; elsewhere never more than what the best one keeps."""
    found = HeadRanks(
        torch.tensor(rows), torch.ones(len(rows), 3, dtype=torch.bool), torch.ones(len(rows), dtype=torch.bool), 2
    )
    shares = found.path_shares()
    best = max(sum(shares.get(path, 0.0) for path in tree) for tree in every_tree(size, 3, 2))
    tree = calibrated_tree(found, size)
    kept = sum(reached(tree, found)) - 1
    assert tree.size == size and kept <= best + 1e-9
    if all(shares.get((*path[:-1], 0), 0.0) >= share for path, share in shares.items()):
        assert kept == pytest.approx(best)


def test_positions_count_where_every_head_is_known():
    """A text that was cut says nothing about the heads that look beyond its end."""
    ranks, known = torch.zeros(20, 3, dtype=torch.int64), torch.ones(20, 3, dtype=torch.bool)
    known[-2:, 1], known[-4:, 2] = False, False
    first = torch.arange(20) == 0
    perfect = HeadRanks(ranks, known, first, 4)
    assert perfect.path_shares() == {(0,): 1.0, (0, 0): 1.0, (0, 0, 0): 1.0} and [
        shares[0] for shares in perfect.accuracies()
    ] == [1.0, 1.0, 1.0]
    for wrong in (
        dict(known=known[:, :2]),
        dict(known=known & False),
        dict(known=known & (torch.arange(3) == 0)),
        dict(choices=0),
        dict(first=first[1:]),
        dict(first=torch.cat([first, first])),
        dict(ranks=ranks[:, 0], known=known[:, 0]),
        dict(ranks=ranks[..., None], known=known[..., None]),
    ):
        with pytest.raises(ValueError, match="must both be|no text is longer than the 4 tokens that 3 heads"):
            HeadRanks(**dict(ranks=ranks, known=known, first=first, choices=4) | wrong)


def test_paths_count_where_rounds_begin():
    """Two texts. With (0,) and (0, 0) a round passes what it has right; the second text begins a round of its own."""
    rows, first = (
        [[0, 0], [0, 1], [1, 0], [0, 0], [0, 0], [0, 0]],
        torch.tensor([True, False, False, False, True, False]),
    )
    found = HeadRanks(torch.tensor(rows), torch.ones(6, 2, dtype=torch.bool), first, 2)
    deep, wide = TokenTree.from_choices([(0,), (0, 0)]), TokenTree.from_choices([(0,), (1,)])
    assert found.path_shares(deep) == {(0,): 1.0, (0, 0): 1.0}  # rounds at 0, 3 and 4
    assert found.path_shares(wide) == pytest.approx(
        {(0,): 2 / 3, (1,): 1 / 3, (0, 0): 2 / 3, (1, 0): 1 / 3}
    )  # at 0, 2 and 4
    assert sum(reached(deep, found)) == 3 and sum(reached(wide, found)) == pytest.approx(2)
    assert calibrated_tree(found, 3) == deep
    late = HeadRanks(torch.tensor([[2, 0], [2, 0]]), torch.ones(2, 2, dtype=torch.bool), first[:2], 2)
    assert late.rounds(TokenTree.from_widths((3, 1))) == [0, 1]  # which of the later choices was right is not known


def test_where_no_round_begins_at_a_known_position_all_known_ones_count():
    """The only round begins where head 1 looks at a token that does not count, and passes the one position that is
    known.
    """
    known = torch.tensor([[True, False], [True, True]])
    found = HeadRanks(torch.zeros(2, 2, dtype=torch.int64), known, torch.tensor([True, False]), 2)
    tree = TokenTree.chain(1)
    assert found.rounds(tree) == [0] and found.path_shares(tree) == found.path_shares() == {(0,): 1.0, (0, 0): 1.0}


def test_rounds_begin_where_they_do_in_decoding():
    pair, (heads, tree) = specdec.load_tiny_pair(), load_tiny_heads()
    prompt = pair.tokenizer(pair.prompts["code"][0], return_tensors="pt").input_ids
    out = MedusaGenerator(pair.target, heads, tree).generate(prompt, max_new_tokens=200)
    length, text = prompt.shape[1], torch.cat([prompt, out.sequences[:, prompt.shape[1] :]], 1)
    found = head_ranks(
        heads,
        pair.target,
        build_rows([{"tokens": text[0].tolist(), "learned_from": length}], pair.tokenizer, 512, packing=False),
    )
    steps = [later - earlier for earlier, later in pairwise(found.rounds(tree))]
    accepted = [
        count + 1 for count in out.stats.rows[0].accepted[1:-4]
    ]  # no draft in the first round; the last look beyond the text
    assert steps[: len(accepted)] == accepted and len(accepted) > 60


def test_with_costs_the_tree_is_the_fastest():
    found = ranks_of(
        [[rank, *rest] for rank in (0, 0, 0, 1, 1, 2, 3, 4) for rest in ([0, 0], [0, 1], [1, 0], [2, 4], [4, 4])]
    )
    assert (
        calibrated_tree(found, 30, Costs(0.01, 0.0, (1, 2), (1.0, 3.0))).size == 2
    )  # where every node is dear, one has to do
    free = Costs(0.01, 0.0, (1, 2), (1.0, 1.0))
    assert sum(reached(calibrated_tree(found, 30, free), found)) == pytest.approx(
        sum(reached(calibrated_tree(found, 30), found))
    )
    assert (
        calibrated_tree(found, 30, free).max_depth == 3
        and calibrated_tree(found, 30, Costs(0.01, 1.0, (1, 2), (1.0, 1.0))).max_depth == 1
    )
    with pytest.raises(ValueError, match="at least 2, got 1"):
        calibrated_tree(found, 1)


def test_with_costs_a_node_that_is_never_right_is_worth_nothing_and_what_comes_behind_it_still_counts():
    found = ranks_of(6 * [[0]] + 3 * [[2]] + [[4]])
    assert calibrated_tree(found, 4, Costs(0.01, 0.0, (1, 8), (1.0, 1.0))).choices == (
        (0,),
        (1,),
        (2,),
    )  # (1,) is only there because (2,) is
    assert (
        calibrated_tree(found, 30, Costs(0.01, 0.0, (1, 8), (1.0, 1.0))).size == 4
    )  # nor is one kept that costs nothing


def test_with_costs_a_tree_ends_where_a_forward_becomes_dear():
    found = ranks_of(4 * [[0]] + 3 * [[1]] + 2 * [[2]] + [[3]])
    for free in (2, 3, 4):
        assert calibrated_tree(found, 30, Costs(0.01, 0.0, (1, free, free + 1), (1.0, 1.0, 9.0))).size == free


def test_no_more_trees_are_looked_at_than_said(monkeypatch):
    """The first tree goes below the second choice; the one that follows from where its rounds begin is the better
    one.
    """
    rows = [[2, 0], [2, 0], [1, 0], [1, 1], [1, 0], [2, 2], [0, 0], [1, 2]]
    found = HeadRanks(torch.tensor(rows), torch.ones(8, 2, dtype=torch.bool), torch.arange(8) == 0, 2)
    monkeypatch.setattr(calibration, "MOST_TREES", 1)
    assert calibrated_tree(found, 4).choices == ((0,), (1,), (1, 0))
    monkeypatch.setattr(calibration, "MOST_TREES", 2)
    assert calibrated_tree(found, 4).choices == ((0,), (1,), (0, 0))


def test_of_the_trees_that_were_tried_the_fastest_is_returned():
    """Rounds of the first tree give 7 / 3 tokens in 1.25 steps, those of the second one 2 tokens in one step."""
    rows = [[0, 2], [0, 0], [0, 1], [0, 0], [0, 0], [2, 2]]
    found = HeadRanks(torch.tensor(rows), torch.ones(6, 2, dtype=torch.bool), torch.arange(6) == 0, 2)
    costs = Costs(0.01, 0.0, (1, 2, 3, 4, 5), (1.0, 1.0, 1.25, 2.0, 2.5))
    assert sum(reached(TokenTree.chain(2), found)) == pytest.approx(7 / 3)
    assert calibrated_tree(found, 5, costs) == TokenTree.chain(1)


def test_a_single_choice_is_enough_and_accuracies_are_summed_for_one_five_and_ten():
    found = HeadRanks(
        torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1, dtype=torch.bool), torch.ones(4, dtype=torch.bool), 1
    )
    assert found.accuracies() == [[0.5]] and calibrated_tree(found, 5).choices == ((0,),)
    assert HeadRanks(*(x[:1] for x in (found.ranks, found.known, found.first)), 3).accuracies() == [[1.0, 0.0, 0.0]], (
        "one share for each choice"
    )
    assert calibration.top_accuracies([[0.25, *[0.0625] * 11]]) == [{1: 0.25, 5: 0.5, 10: 0.8125}]


@pytest.mark.parametrize("costs", [None, Costs(0.01, 0.5, (1, 2), (1.0, 1.25))])
def test_a_tree_is_read_as_it_was_written_with_what_it_follows_from(costs, tmp_path):
    tree = TokenTree.from_choices([(0,), (1,), (0, 0)])
    calibration.save_tree(tmp_path, tree, [[0.5, 0.25]], costs, texts=7)
    assert calibration.load_tree(tmp_path) == calibration.load_tree(str(tmp_path)) == tree
    said = json.loads((tmp_path / "tree.json").read_text())
    assert said == {
        "choices": [[0], [1], [0, 0]],
        "nodes": 4,
        "accuracies": [[0.5, 0.25]],
        "texts": 7,
        "costs": costs and {"step_seconds": 0.01, "draft": 0.5, "sizes": [1, 2], "verify": [1.0, 1.25]},
    }
    (tmp_path / "tree.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tree.json; python -m scripts.calibrate_medusa writes one"):
        calibration.load_tree(tmp_path)


def test_a_calibrated_tree_decodes():
    model = build("llama")
    heads = MedusaHeads.for_model(model, 3)
    texts = [model.generate(torch.tensor([[n, n + 1]]), max_new_tokens=20, do_sample=False)[0] for n in (5, 9)]
    tree = calibrated_tree(head_ranks(heads, model, texts, choices=3), 8)
    out = MedusaGenerator(model, heads, tree).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12)
    assert out.lengths[0] == 12
