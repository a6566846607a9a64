"""How much is drafted under load, on simulated cards: as much as pays for the rows there, down to nothing."""

import random

import pytest

from specdec.planning.candidates import MOST_NODES, chain, shapes_under_load
from specdec.planning.fit import Fit
from specdec.planning.load import LoadPolicy
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, Place
from specdec.trees.tree import TokenTree


def seconds_of(shape, rows):
    """A card that verifies 96 tokens in the time of one, and drafts a level in a tenth of a step."""
    nodes, levels = shape.tokens, 0 if shape.tree is None else shape.tree.max_depth
    return 0.006 * (max(1.0, rows * (nodes + 1) / 96) + 0.1 * levels)


class Load:
    """Rows that accept each drafted token of a chain with a probability of their own."""

    def __init__(self, acceptances, measures=True, tree=None, card=seconds_of, levels=0):
        self.acceptances, self.draws, self.measures, self.card = acceptances, random.Random(0), measures, card
        own = TokenTree.chain(5) if tree is None else tree
        shapes = shapes_under_load("tree", own, own.max_depth, levels)
        most = max(shape.tokens for shape in shapes)
        self.policy = LoadPolicy(Fit(has_model=True), shapes, most, most_nodes=MOST_NODES)

    def round(self, slots, shape=None):
        """One round on the device of so many slots -> its shape."""
        policy, rows = self.policy, range(len(self.acceptances))
        policy.look(rows)
        if policy._place is None or policy._place.rows != slots:
            measure = lambda shape: self.card(shape, slots)
            policy.enter(Place(slots, lambda: 500, lambda shape: True, measure, self.measures))
        shape = policy.next()
        emitted, ranks = [], []
        for acceptance in self.acceptances:
            taken = 0
            while taken < shape.tokens and self.draws.random() < acceptance:
                taken += 1
            emitted.append(taken + 1)
            ranks.append([(1, 0)] * taken + [(1, None)] * (taken < shape.tokens))
        policy.observe(shape, self.card(shape, slots), ranks, sum(emitted) / len(emitted))
        policy.observe_rows((row, shape.name, tokens) for row, tokens in zip(rows, emitted, strict=True))
        return shape

    def settled(self, slots, rounds=200):
        """The shape that most of the last rounds had."""
        shapes = [self.round(slots) for _ in range(rounds)][rounds // 2 :]
        return max(shapes, key=shapes.count)


def seconds_over_a_bus(shape, rows):
    """A target whose weights cross a bus for each pass, which hides hundreds of tokens, and a draft model on a card."""
    nodes, levels = shape.tokens, 0 if shape.tree is None else shape.tree.max_depth
    return 1.0 + 0.01 * levels + 0.5 * max(0.0, rows * (nodes + 1) / MOST_NODES - 1)


def best(acceptance, rows):
    """The shape with the most tokens a second on the simulated card."""
    tokens = lambda n: sum(acceptance**i for i in range(n + 1))
    shapes = [PLAIN, *map(chain, (1, 2, 3, 5))]
    return max(shapes, key=lambda shape: tokens(shape.tokens) / seconds_of(shape, rows))


@pytest.mark.parametrize("measures", [True, False], ids=["measured", "from rounds"])
@pytest.mark.parametrize("rows", [1, 8, 32, 96, 256])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.95])
def test_the_shape_is_nearly_the_best_for_the_load(acceptance, rows, measures):
    found, wanted = Load([acceptance] * rows, measures).settled(rows), best(acceptance, rows)
    speed = lambda shape: sum(acceptance**i for i in range(shape.tokens + 1)) / seconds_of(shape, rows)
    assert speed(found) > 0.93 * speed(wanted), (found, wanted)
    assert speed(found) > 0.97 * speed(PLAIN)


def test_speculation_ends_as_rows_come_and_begins_as_they_go():
    load = Load([0.6] * 4)
    assert load.settled(4) != PLAIN
    load.acceptances = [0.6] * 256
    assert load.settled(256) == PLAIN
    load.acceptances = [0.6] * 4
    assert load.round(4) != PLAIN  # at once: the times are known


def test_a_request_that_accepts_little_drafts_nothing_beside_others_that_do():
    load = Load([0.9] * 30 + [0.05] * 2)
    load.settled(32)
    assert load.policy.next() != PLAIN
    shapes = load.policy.of_rows(range(32))
    assert all(shape != PLAIN for shape in shapes[:30]) and shapes[30:] == [PLAIN, PLAIN]


def test_plain_rounds_try_again_for_a_hundredth_of_the_time():
    load = Load([0.02] * 2)
    shapes = [load.round(2) for _ in range(4000)]
    drafted = sum(seconds_of(shape, 2) for shape in shapes[200:] if shape != PLAIN)
    assert 0 < drafted < 0.05 * sum(seconds_of(shape, 2) for shape in shapes[200:])
    load.acceptances = [0.9] * 2
    assert load.settled(2, 20_000) != PLAIN


def test_shapes_under_load_are_the_own_one_and_smaller_ones():
    tree = TokenTree.from_widths((3, 2, 2, 1))
    shapes = shapes_under_load("tree", tree, tree.max_depth)
    assert shapes[0].tree == tree and all(shape.tokens <= tree.size - 1 for shape in shapes)
    assert {chain(1), chain(2), chain(3)} <= {*shapes} and any(not one.tree.is_chain for one in shapes[1:])
    assert shapes_under_load("own", None, 5) == [DRAFTERS_OWN]
    assert shapes_under_load("chain", None, 4) == [chain(4), chain(1), chain(2), chain(3)]


@pytest.mark.parametrize("measures", [True, False], ids=["measured", "from rounds"])
@pytest.mark.parametrize(("acceptance", "rows", "least"), [(0.99, 1, 32), (0.95, 8, 16), (0.95, 64, 5)])
def test_drafts_are_long_where_every_pass_brings_weights(acceptance, rows, least, measures):
    """Never so long that all rows together draft more than passes hide."""
    load = Load([acceptance] * rows, measures, card=seconds_over_a_bus, levels=48)
    found = load.settled(rows)
    assert found.tokens >= least and rows * (found.tokens + 1) <= MOST_NODES
    elsewhere = Load([acceptance] * rows, measures, card=seconds_over_a_bus)
    assert elsewhere.settled(rows).tokens <= 5


def test_long_drafts_end_as_rows_come():
    load = Load([0.97] * 2, card=seconds_over_a_bus, levels=48)
    assert load.settled(2).tokens >= 16
    load.acceptances = [0.97] * 64
    assert all(64 * (load.round(64).tokens + 1) <= MOST_NODES for _ in range(50))


def test_shapes_where_every_pass_brings_weights_are_as_deep_as_the_drafter_goes():
    usual, long = shapes_under_load("tree", None, 4), shapes_under_load("tree", None, 4, 48)
    assert long[: len(usual)] == usual and {chain(12), chain(48)} <= {*long}
    assert max(shape.tokens for shape in long if not shape.tree.is_chain) == 63
    assert max(shape.tree.max_depth for shape in shapes_under_load("tree", None, 3, 6)) == 6
    assert max(shape.tokens for shape in shapes_under_load("chain", None, 3, 8)) == 8
    assert shapes_under_load("own", None, 5, 48) == [DRAFTERS_OWN]
