"""The policy of captured rounds on a simulated card."""

import json
import math
import random

import pytest

from specdec.planning.candidates import MOST_NODES, SIZES, Candidates
from specdec.planning.fit import Fit
from specdec.planning.fitted import FEW, PROBE_ROUNDS
from specdec.planning.kept_times import KeptTimes
from specdec.planning.path_counts import PathCounts, tokens_of
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, shape_of
from specdec.planning.round_times import RoundTimes
from specdec.planning.theory import expected_tree_tokens
from specdec.trees.tree import TokenTree
from tests.specdec.planning.card import CASES, MODEL, RIGHT, WRONG, Card


@pytest.mark.covering
@pytest.mark.parametrize("rows", [1, 4, 16, 32])
@pytest.mark.parametrize("case", CASES)
def test_it_comes_close_to_the_best_shape_and_captures_few(case, rows):
    ratios = []
    for seed in range(2):
        card = Card(rows=rows, seed=seed, noise=0.02, **CASES[case])
        card.speed(8)
        ratios.append(card.speed(6) / card.best())
        names = {shape.name for shape in card.captured[rows]}  # trees of one size and depth take the same time
        assert len(card.captured[rows]) <= FEW + 1 and card.measured == len(names)
    assert sum(ratios) / len(ratios) > 0.93


@pytest.mark.parametrize("shapes", ["tree", "own"])
@pytest.mark.parametrize("level", [0.02, 0.12])
def test_a_drafter_that_is_always_wrong_costs_little_once_it_is_known(shapes, level):
    card = Card(WRONG, level=level, shapes=shapes)
    assert card.speed(2) > 0.8
    assert card.speed(20) > 0.985 and card.fit.last[1] == PLAIN


@pytest.mark.parametrize("level", [0.02, 0.12])
def test_it_returns_to_drafting_when_drafting_pays_again(level):
    card = Card(WRONG, level=level)
    card.speed(4)
    card.acceptance = RIGHT
    seconds = lambda shapes: sum(map(card.seconds, shapes))
    while PLAIN in card.rounds[-20:] and seconds(card.rounds) < 60:
        card.call()
    waited = seconds(card.rounds)
    assert card.fit.last[1] != PLAIN and waited < (1.5 if level < 0.1 else 15), "a probe is due each hundredth"
    assert PROBE_ROUNDS < 20


def test_other_numbers_of_rows_profit_from_what_is_known_of_acceptance():
    one = Card(MODEL, level=0.12)
    one.speed(8)
    many = Card(MODEL, rows=32, level=0.12, fit=one.fit)
    many.speed(1)
    assert many.speed(2) > 0.95 * many.best() and len(many.captured[32]) <= 6


def test_times_are_kept_between_processes_and_serve_those_of_the_same_key(tmp_path):
    kept = lambda key: KeptTimes(tmp_path / "deep" / "times.json", key)
    first = Card(MODEL, level=0.12, fit=Fit(True, kept("a card")))
    first.speed(4)
    again = Card(MODEL, level=0.12, fit=Fit(True, kept("a card"), first.fit.counts))
    again.speed(2)
    assert again.measured == 0 and again.speed(2) > 0.95 * again.best()
    assert kept("another card").load(1) == {} == kept("a card").load(2) == KeptTimes().load(1)
    names = set(kept("a card").load(1))
    kept("another card").save(1, {"plain": (0, 0, 0.5)})
    assert set(kept("a card").load(1)) == names and kept("another card").load(1) == {"plain": (0, 0, 0.5)}
    entries = json.loads((tmp_path / "deep" / "times.json").read_text())["entries"]
    others = [
        json.dumps({"format": 1, "entries": dict.fromkeys(entries, entry)}) for entry in (3, {"1": 5}, {"1": {"a": 1}})
    ]
    for broken in ("{", "[]", '{"format": 0}', '{"format": 1, "entries": 3}', *others):
        (tmp_path / "deep" / "times.json").write_text(broken)
        assert kept("a card").load(1) == {}
    KeptTimes(tmp_path / "deep" / "times.json" / "no folder").save(1, {})


def test_shapes_that_cannot_be_captured_are_left_out(tmp_path):
    """The first one wanted among them; nothing of it is kept."""
    card = Card(MODEL, level=0.12, fit=Fit(True, KeptTimes(tmp_path / "times.json", "a card")))
    measures = card.capture
    card.capture = lambda shape: math.inf if shape.tree is not None and shape.tree.size > 3 else measures(shape)
    for _ in range(6):
        card.call()
    assert card.rounds and all(shape.tree is None or shape.tree.size <= 3 for shape in card.rounds)
    assert any(shape != PLAIN for shape in card.rounds)
    kept = KeptTimes(tmp_path / "times.json", "a card").load(1)
    assert kept and all(nodes < 3 and math.isfinite(seconds) for _, nodes, seconds in kept.values())


def test_few_tokens_are_not_worth_a_capture_or_a_step_back():
    card = Card(MODEL, level=0.12)
    card.call(tokens=20)
    assert card.measured == 0 and set(card.rounds) == {card.candidates.first()}
    card.speed(4)
    card.fit.last[1] = PLAIN
    before = len(card.rounds)
    card.call(tokens=30)
    assert set(card.rounds[before:]) == {PLAIN}, "a round on the host would take longer than all that is left"


def test_times_of_other_shapes_follow_those_that_were_measured():
    times = RoundTimes(1, True)
    with pytest.raises(ValueError, match="plain round of 1 rows was not measured"):
        times.seconds(PLAIN)
    times.measured(PLAIN, 0.01)
    guess = times.seconds(shape_of(TokenTree.chain(6)))
    for length in (2, 4, 8):
        times.measured(shape_of(TokenTree.chain(length)), 0.01 * (1.2 + 0.3 * length))
    assert 0.01 < guess < times.seconds(shape_of(TokenTree.chain(6))) == pytest.approx(0.03, abs=0.001)
    chain = shape_of(TokenTree.chain(4))
    times.learn(chain, 9.0)  # another program had the card for a moment
    assert times.seconds(chain) < 0.027 and times.decoded == 9.0
    for _ in range(200):
        times.learn(chain, 0.021)
    assert times.seconds(chain) == pytest.approx(0.021, rel=0.02) and times.step == 0.01


def test_rounds_on_one_tree_tell_of_the_others():
    counts, draws = PathCounts(), random.Random(0)
    wide = TokenTree.from_widths((3, 2, 1))
    card = Card([[0.6, 0.2, 0.1], [0.5, 0.2]])
    card.draws = draws
    for _ in range(3000):
        counts.observe([card.walk(wide)])
    for tree in (wide, TokenTree.chain(2), TokenTree.from_widths((2, 2))):
        assert tokens_of(tree, counts.reach()) == pytest.approx(expected_tree_tokens(tree, card.acceptance), abs=0.12)
    counts.fade_to(10.0)
    assert max(counts.tried.values()) == 10.0
    counts.observe([()])  # a row without a draft


def test_candidates_fit_the_drafter_and_the_batch():
    reached = PathCounts().reach()
    heads = Candidates("tree", 3, TokenTree.from_widths((3, 2, 1)), 100)
    paths = {path for shape in heads.trees(reached, 1) for path in shape.tree.choices}
    assert paths <= set(heads.own.choices) | {(0,), (0, 0), (0, 0, 0)} and heads.max_tokens == 63
    assert all(shape.tree.max_depth <= 3 for shape in heads.trees(reached, 1) + heads.chains())
    free = Candidates("tree", None, TokenTree.chain(5), 100)
    assert {shape.tree.size for shape in free.trees(reached, 1)} == set(SIZES)
    assert max(shape.tree.size for shape in free.trees(reached, 32)) * 32 <= MOST_NODES
    assert Candidates("tree", vocab_size=1 << 20).trees(reached, 16) == []
    assert Candidates("chain").trees(reached, 1) == [] and Candidates("chain").max_tokens == 12
    assert Candidates("own").chains() == [DRAFTERS_OWN] == [Candidates("own").first()]
    assert Candidates("tree", 1).first() == shape_of(TokenTree.chain(1))
