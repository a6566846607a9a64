"""The policy of captured rounds on a simulated card: times are arithmetic, acceptance is drawn with a seed."""

import json
import math
import random

import pytest

from specdec.planning.candidates import MOST_NODES, SIZES, Candidates
from specdec.planning.fitted import FEW, PROBE_ROUNDS, Fit, FittedPolicy
from specdec.planning.kept_times import KeptTimes
from specdec.planning.path_counts import PathCounts, tokens_of
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, Place, shape_of
from specdec.planning.round_times import RoundTimes
from specdec.planning.theory import expected_tree_tokens
from specdec.planning.tree_search import greedy_tree
from specdec.trees.tree import TokenTree

HEADS = [[0.5, 0.15, 0.09, 0.05, 0.03, 0.02], [0.45, 0.15, 0.1, 0.05, 0.04, 0.03], [0.4, 0.14, 0.1, 0.07], [0.35, 0.2]]
MODEL = [[0.75, 0.1, 0.04, 0.02]]
RIGHT, WRONG = [[0.9, 0.04]], [[0.0]]


class Card:
    """Rounds cost as on a card that verifies `free` nodes of all rows for nothing, then takes `node` steps for each."""

    def __init__(self, acceptance, rows=1, level=0.03, free=64, node=0.004, noise=0.0, seed=0, fit=None, **candidates):
        self.acceptance, self.rows, self.level, self.free, self.node, self.noise = (
            acceptance, rows, level, free, node, noise,
        )  # fmt: skip
        self.draws, self.fit = random.Random(seed), fit or Fit(has_model=level > 0.05)
        self.candidates = Candidates(**{"shapes": "tree", "vocab_size": 16384} | candidates)
        self.captured, self.measured, self.rounds = {}, 0, []

    def seconds(self, shape):
        if shape == PLAIN:
            return 0.001
        levels, nodes = (3, 16) if shape.tree is None else (shape.tree.max_depth, shape.tree.size)
        return 0.001 * (1.15 + self.level * levels + self.node * max(0, nodes * self.rows - self.free))

    def capture(self, shape):
        self.captured.setdefault(self.rows, set()).add(shape)
        self.measured += 1
        return self.seconds(shape)

    def walk(self, tree):
        """What one row accepts: (children, rank) of each node passed."""
        passed, node = [], 0
        while tree.children[node]:
            row = self.acceptance[min(len(passed), len(self.acceptance) - 1)]
            u, rank = self.draws.random(), None
            for r in range(len(tree.children[node])):
                u -= row[r] if r < len(row) else 0.0
                if u < 0:
                    rank = r
                    break
            passed.append((len(tree.children[node]), rank))
            if rank is None:
                break
            node = tree.children[node][rank]
        return tuple(passed)

    def call(self, tokens=200):
        """One call of so many tokens a row."""
        policy = FittedPolicy(self.fit, self.candidates, self.rows, 5)
        done = 1.0
        place = Place(
            self.rows, lambda: int(tokens - done), lambda s: s in self.captured.get(self.rows, ()), self.capture
        )
        policy.enter(place)
        while done < tokens:
            shape = policy.next()
            if shape not in self.captured.get(self.rows, ()):  # a pause
                policy.enter(place)
                shape = policy.next()
                self.captured.setdefault(self.rows, set()).add(shape)
            tree = shape.tree or (TokenTree.chain(0) if shape == PLAIN else TokenTree.chain(3))
            ranks = [self.walk(tree) for _ in range(self.rows)]
            gained = 1 + sum(sum(rank is not None for _, rank in row) for row in ranks) / self.rows
            took = self.seconds(shape) * (1 + self.noise * self.draws.random())
            policy.observe(shape, took, ranks, gained)
            done += gained
            self.rounds.append(shape)

    def speed(self, calls):
        """Tokens per step of so many calls, expected on the shapes that they chose."""
        before = len(self.rounds)
        for _ in range(calls):
            self.call()
        chosen = self.rounds[before:]
        return sum(map(self.tokens, chosen)) / sum(map(self.seconds, chosen)) * 0.001

    def tokens(self, shape):
        """Expected tokens of a round."""
        tree = shape.tree or TokenTree.chain(0 if shape == PLAIN else 3)
        return expected_tree_tokens(tree, self.acceptance + [self.acceptance[-1]] * 8)

    def best(self):
        """Tokens per step of the best tree or chain there is."""
        shapes = [shape_of(TokenTree.chain(n)) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12)]
        rows = self.acceptance + [self.acceptance[-1]] * 8
        for size in SIZES if self.candidates.shapes == "tree" else ():
            for depth in (1, 2, 3, 4, 6, 8):
                shapes.append(shape_of(greedy_tree(rows[: min(depth, self.candidates.deepest or depth)], size)))
        return max([1.0, *(self.tokens(shape) * 0.001 / self.seconds(shape) for shape in shapes)])


CASES = {
    "heads": dict(acceptance=HEADS, deepest=5, own=greedy_tree(HEADS, 64)),
    "model": dict(acceptance=MODEL, level=0.12, own=TokenTree.chain(5)),
    "easy": dict(acceptance=RIGHT, level=0.12, own=TokenTree.chain(5)),
    "chains": dict(acceptance=MODEL, level=0.12, shapes="chain"),
}


@pytest.mark.parametrize("rows", [1, 4, 16, 32])
@pytest.mark.parametrize("case", CASES)
def test_it_comes_close_to_the_best_shape_and_captures_few(case, rows):
    ratios = []
    for seed in range(2):
        card = Card(rows=rows, seed=seed, noise=0.02, **CASES[case])
        card.speed(8)
        ratios.append(card.speed(6) / card.best())
        assert len(card.captured[rows]) <= FEW + 1 and card.measured == len(card.captured[rows])
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
