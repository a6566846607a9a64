"""The size of trees that a drafter grows, on simulated cards: as large as verifying them is worth."""

import random
from math import log2

import pytest

from specdec.planning.adaptive import AdaptivePolicy, CostModel
from specdec.planning.candidates import Candidates, shapes_under_load
from specdec.planning.fit import Fit
from specdec.planning.fitted import FittedPolicy
from specdec.planning.grown_counts import SIZES, GrownCounts, sizes_up_to
from specdec.planning.load import LoadPolicy
from specdec.planning.policy import PLAIN, Place, grown_shape

LARGEST = 256
SHAPES = [PLAIN, *map(grown_shape, SIZES)]


class Card:
    """A step takes a second; a round takes 1.2 and `node` for each node of all rows beyond `free` ones."""

    def __init__(self, rows=1, free=64, node=0.01, slope=0.5, start=1.0):
        self.rows, self.free, self.node, self.slope, self.start = rows, free, node, slope, start
        self.draws, self.rounds, self.captured = random.Random(0), [], set()

    def seconds(self, shape):
        if shape == PLAIN:
            return 1.0
        return 1.2 + self.node * max(0, self.rows * (shape.tokens + 1) - self.free)

    def tokens(self, shape):
        return 1.0 if shape == PLAIN else 1 + self.start + self.slope * log2(shape.tokens)

    def speed(self, shapes):
        return sum(map(self.tokens, shapes)) / sum(map(self.seconds, shapes))

    def best(self):
        return max(self.speed([shape]) for shape in SHAPES)

    def place(self):
        measure = lambda shape: self.captured.add(shape) or self.seconds(shape)
        return Place(self.rows, lambda: 500, lambda shape: shape in self.captured, measure)

    def run(self, policy, rounds=150):
        policy.enter(self.place())
        for _ in range(rounds):
            if policy.next() not in self.captured:
                policy.enter(self.place())
                self.captured.add(policy.next())
            shape, noise = policy.next(), 0.6 * (self.draws.random() - 0.5)
            self.rounds.append(shape)
            policy.observe(shape, self.seconds(shape), [()] * self.rows, self.tokens(shape) + (shape != PLAIN) * noise)


CARDS = {
    "large": dict(free=400), "medium": dict(free=40, node=0.02), "small": dict(free=8, node=0.08),
    "a batch": dict(rows=8, free=128, node=0.02), "a loss": dict(free=0, node=0.05, slope=0.02, start=0.0),
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
def test_captured_rounds_take_about_the_best_size(card):
    card, fit = Card(**CARDS[card]), Fit()
    for _ in range(6):
        card.run(FittedPolicy(fit, Candidates("grown", 7, None, 1024, LARGEST), card.rows, LARGEST))
    assert card.speed(card.rounds[-300:]) > 0.93 * card.best()


@pytest.mark.parametrize("card", CARDS)
def test_eager_rounds_take_about_the_best_size(card):
    card, machine = Card(**CARDS[card]), CostModel()
    for _ in range(6):
        card.run(AdaptivePolicy(machine, "grown", LARGEST))
    assert card.speed(card.rounds[-300:]) > 0.9 * card.best()


@pytest.mark.parametrize("card", ["large", "medium", "a batch"])
def test_engines_take_nearly_the_best_size(card):
    """They measure two shapes at most, so that the times of others are predictions."""
    card = Card(**CARDS[card])
    policy = LoadPolicy(Fit(), shapes_under_load("grown", None, 7, largest=LARGEST), LARGEST, most_nodes=4096)
    for _ in range(400):
        policy.look(range(card.rows))
        card.run(policy, rounds=1)
    assert card.speed(card.rounds[-200:]) > 0.85 * card.best()


def test_a_size_that_ran_tells_of_others_and_most_of_its_own():
    counts = GrownCounts()
    before = counts.tokens(64)
    for _ in range(60):
        counts.observe(16, 5.0)
    assert abs(counts.tokens(16) - 5.0) < 0.1 and counts.tokens(64) > before and counts.tokens(64) > counts.tokens(16)
    for _ in range(60):
        counts.observe(64, 5.0)
    assert abs(counts.tokens(64) - 5.0) < 0.15, "what was measured outweighs the line"
    assert counts.tokens(8) <= counts.tokens(16) + 0.1


def test_sizes_end_with_the_drafters_own_largest_and_fit_the_rows():
    assert (
        sizes_up_to(255) == [7, 15, 31, 63, 127, 255] and sizes_up_to(40) == [7, 15, 31, 40] and sizes_up_to(3) == [3]
    )
    few = Candidates("grown", 7, None, 1 << 17, LARGEST).chains(8)
    assert (
        few
        and max(shape.tokens for shape in few) * 8 <= 512
        and Candidates("grown", 7, None, 9, 5).first() == grown_shape(5)
    )
    assert (
        grown_shape(64).name == "grown 64"
        and grown_shape(64).tokens == 64
        and grown_shape(64).levels == 0
        and grown_shape(64).tree is None
    )
