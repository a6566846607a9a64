"""The scout of `FittedPolicy`: the large tree that runs for a few rounds before new shapes are considered."""

from itertools import groupby

import pytest

from specdec.planning.candidates import Candidates
from specdec.planning.fitted import LOOK_EVERY, PROBE_ROUNDS, SCOUT_ROUNDS, TRY_SHARE, FittedPolicy
from specdec.planning.path_counts import PathCounts
from specdec.planning.policy import PLAIN, shape_of
from specdec.trees.tree import TokenTree
from tests.specdec.planning.card import CASES, MODEL, WRONG, Card, by_path, own_tree

CHAIN = lambda length: shape_of(TokenTree.chain(length))


@pytest.mark.parametrize(("free", "node"), [(64, 0.004), (16, 0.003)])
def test_paths_that_small_trees_do_not_offer_are_found(free, node):
    """Chains and trees of two levels tell little of what follows the second child, where most is accepted."""
    ratios = []
    for seed in range(3):
        card = Card(by_path, free=free, node=node, seed=seed, noise=0.02, deepest=5, own=own_tree(by_path))
        card.speed(8)
        ratios.append(card.speed(6) / card.best())
        assert card.measured <= 6
    assert sum(ratios) / len(ratios) > 0.98


def scouts_of(card):
    """The lengths of its runs of the scout's rounds, and where each begins."""
    (scout,) = card.fit.scouts.values()
    runs, begin = [], 0
    for shape, run in groupby(card.rounds):
        length = len(list(run))
        runs += [(length, begin)] * (shape == scout)
        begin += length
    return runs


def test_it_runs_first_and_again_where_that_costs_little():
    card = Card(MODEL, rows=4, level=0.12)
    card.speed(30)
    (scout,) = card.fit.scouts.values()
    assert scout.tree.size == 64 and scout.tree.max_depth >= 4
    runs = scouts_of(card)
    assert runs[0] == (SCOUT_ROUNDS, 0) and 3 <= len(runs) <= 8, "and not because it ran"
    assert all(length == SCOUT_ROUNDS and begin >= 100 for length, begin in runs[1:])
    assert sum(card.seconds(scout) * length for length, _ in runs[1:]) < 0.02 * sum(map(card.seconds, card.rounds))
    assert [name for _, name in card.measures].count(scout) == 1


def ready(acceptance=MODEL, rows=4, calls=6, **options):
    """A card whose scout is due, and affordable, at the next look."""
    card = Card(acceptance, rows=rows, level=0.12, **options)
    card.speed(calls)
    times = card.fit.times[rows]
    times.decoded, times.since, times.scouted = 1e6, times.between, 0
    return card, times, card.fit.scouts[rows]


def entered(card, left=200):
    policy = FittedPolicy(card.fit, card.candidates, card.rows, 5)
    policy.enter(card.place(lambda: left))
    return policy


def rounds(card, policy, count):
    for _ in range(count):
        shape = policy.next()
        policy.observe(shape, card.seconds(shape), [card.walk(shape.tree or TokenTree.chain(0))] * card.rows, 1.0)


def test_a_review_follows_its_rounds_and_the_shape_before_is_kept_if_none_is_better():
    card, times, scout = ready([[0.6, 0.05]], rows=16, calls=20)
    before = card.fit.last[16]
    policy = entered(card)
    assert policy.next() == scout != before and card.fit.last[16] == before
    rounds(card, policy, SCOUT_ROUNDS - 1)
    assert policy.next() == scout and times.review_due
    rounds(card, policy, 1)
    assert policy.next() == before and not times.review_due and times.scouted == 0


def test_it_goes_on_in_the_next_call():
    card, times, scout = ready()
    policy = entered(card)
    rounds(card, policy, 5)
    policy = entered(card)
    assert policy.next() == scout and times.scouted == 5
    rounds(card, policy, SCOUT_ROUNDS - 5)
    assert policy.next() != scout and times.scouted == 0


def test_a_look_begins_it_too_and_outcomes_in_flight_do_not_count():
    card, times, scout = ready()
    times.since = 0
    policy = entered(card)
    before = policy.next()
    assert before != scout
    rounds(card, policy, LOOK_EVERY - 1)
    times.since = times.between
    policy.observe(before, 0.001, [()] * 4, 1.0)
    assert policy.next() == scout
    policy.observe(before, 0.001, [()] * 4, 1.0)  # launched before the scout
    rounds(card, policy, SCOUT_ROUNDS - 1)
    assert policy.next() == scout and times.scouted == SCOUT_ROUNDS - 1
    rounds(card, policy, 1)
    assert policy.next() == before


def test_a_scout_that_was_dropped_is_captured_in_a_pause():
    card, times, scout = ready()
    del times.known[scout.name]
    before = len(card.measures)
    assert entered(card).next() == scout and card.measures[before:] == [(4, scout)]


def test_it_does_not_run_where_it_would_cost_much_or_tell_nothing():
    card, times, scout = ready()
    seconds, speed = times.seconds(scout), card.tokens(scout) / times.seconds(scout)
    best = card.tokens(card.fit.last[4]) / times.seconds(card.fit.last[4])
    lost = SCOUT_ROUNDS * seconds * (1 - speed / best)
    for share, runs in ((0.5, False), (2.0, True)):
        times.decoded, times.since, times.scouted = share * lost / TRY_SHARE, times.between, 0
        assert (entered(card).next() == scout) == runs
    del times.known[scout.name]
    times.decoded, times.since, before = 0.0, times.between, card.measured
    entered(card)
    assert (4, scout) not in card.measures[before:], "nor is it captured then"
    times.decoded, times.since = 1e6, times.between
    assert entered(card, left=20).next() != scout
    times.since, times.scouted = times.between, SCOUT_ROUNDS
    assert entered(card).next() != scout, "it has just run"


def test_it_does_not_run_beside_plain_rounds():
    card, times, scout = ready(WRONG, rows=1)
    assert card.fit.last[1] == PLAIN == entered(card).next()
    times.measured(CHAIN(1), card.capture(CHAIN(1)))
    card.fit.plain_seconds, times.since = 1e6, 0
    policy = entered(card)
    rounds(card, policy, LOOK_EVERY)
    assert policy.next() == CHAIN(1), "a probe"
    times.since, times.between, times.scouted = 1000, 1000, 0
    rounds(card, policy, PROBE_ROUNDS)
    assert policy.next() == PLAIN


def test_one_that_cannot_be_captured_is_left_out():
    card = Card(MODEL, level=0.12)
    measures = card.capture
    card.capture = lambda shape: float("inf") if shape.tree is not None and shape.tree.size > 32 else measures(shape)
    card.speed(4)
    assert card.fit.scouts[1].tree.size == 64 and card.fit.scouts[1] not in card.rounds
    assert (1, CHAIN(3)) in card.measures and card.speed(4) > 0.85 * card.best()


def test_trees_reach_as_deep_as_the_drafter_and_the_scout_is_the_largest():
    reached = PathCounts().reach()
    heads = Candidates("tree", 5, own_tree(by_path), 100)
    scout = heads.scout(reached, 1)
    assert {shape.tree.max_depth for shape in heads.trees(reached, 1)} == {2, 3, 4, 5}
    assert scout.tree.size == 64 and scout.tree.max_depth == 5 and scout in heads.trees(reached, 1)
    assert heads.scout(reached, 32).tree.size == 16
    assert set(heads.scout(reached, 4).tree.choices) <= set(heads.own.choices) | {(0,) * n for n in range(1, 6)}
    assert Candidates("chain").scout(reached, 1) is None
    assert Candidates("tree", 3, TokenTree.from_widths((2, 1)), 100).scout(reached, 1) is None, "small as it is"
    deep = Candidates("tree", None, None, 100)
    most = max(shape.tree.max_depth for shape in deep.trees(reached, 1) if shape.tree.size == 64)
    assert deep.scout(reached, 1).tree.max_depth == most


def test_drafters_without_trees_start_with_a_chain_of_three():
    card = Card(**CASES["chains"])
    card.call()
    assert card.rounds[0] == CHAIN(3) and card.fit.scouts == {1: None}
