"""`FittedPolicy` where the rows of a batch end at different times."""

import pytest

from specdec.planning.fit import Fit
from specdec.planning.fitted import LOOK_EVERY, TAIL_SECONDS, FittedPolicy
from specdec.planning.idle_slots import IdleSlots
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, FixedPolicy, shape_of
from specdec.planning.round_times import STARTS_WITH, RoundTimes
from specdec.trees.tree import TokenTree
from tests.specdec.planning import card as cards
from tests.specdec.planning.card import CASES, MODEL, WRONG, Card

CHAIN = lambda length: shape_of(TokenTree.chain(length))
UNEVEN = (1.1, 1.1, 1.0, 0.8)


@pytest.mark.parametrize("case", ["heads", "model", "chains"])
@pytest.mark.parametrize("rows", [4, 32])
def test_a_tail_captures_one_shape_for_each_number_of_rows_and_measures_none(case, rows):
    card = Card(rows=rows, ease=UNEVEN, **CASES[case])
    for _ in range(6):
        _, _, ran = card.batch()
        assert all(at == rows for at, _ in card.measures)
        assert all(len(shapes) == 1 for at, shapes in card.captured.items() if at < rows)
    assert {at for at, _ in ran} > {rows} and card.fit.scouts.keys() <= {rows}
    assert all(len(card.fit.times[at].known) == 1 for at in card.captured if at < rows)


def tail(card, rows, policy=None, left=100):
    """Card and policy, where `rows` rows are left of a call that has begun with all of them."""
    policy = policy or started(card)
    card.rows = rows
    policy.enter(card.place(lambda: left))
    return policy


def started(card):
    policy = FittedPolicy(card.fit, card.candidates, card.rows, 5)
    policy.enter(card.place(lambda: 100))
    return policy


def hold(card, rows, *shapes):
    """Have shapes captured and measured at `rows` rows."""
    all_rows, card.rows = card.rows, rows
    for shape in shapes:
        card.fit.times_of(rows).measured(shape, card.seconds(shape))
        card.captured.setdefault(rows, set()).add(shape)
    card.rows = all_rows


def learned(**options):
    """A card whose policy knows what it does of full batches of 8 rows."""
    card = Card(**{"acceptance": MODEL, "rows": 8, "level": 0.25, "shapes": "chain"} | options)
    card.speed(8)
    card.measures.clear()
    return card


def test_in_a_tail_the_best_of_what_is_captured_there_runs():
    card = learned()
    now = card.fit.last[8]
    assert tail(card, 4).next() == now and not card.measures, "what runs goes on if nothing is"
    card = learned()
    assert now == CHAIN(3)
    hold(card, 4, CHAIN(1))
    assert tail(card, 4).next() == CHAIN(1), "rather than a capture"
    card = learned()
    hold(card, 4, CHAIN(1), CHAIN(2), PLAIN)
    assert tail(card, 4).next() == CHAIN(2)
    card = learned()
    hold(card, 4, CHAIN(1), CHAIN(3))
    assert tail(card, 4).next() == CHAIN(3)
    card = learned()
    hold(card, 4, CHAIN(3), CHAIN(5))
    card.fit.times[4].measured(CHAIN(5), 0.0005)
    assert tail(card, 4).next() == CHAIN(5), "though the present shape is captured too"
    assert not card.measures


def test_looks_in_a_tail_choose_among_what_is_captured_there():
    card = learned()
    policy = tail(card, 4)
    for _ in range(LOOK_EVERY):
        policy.observe(CHAIN(3), 0.001, [()], 1.0)
    card.captured[4] = {CHAIN(3), CHAIN(1)}
    card.fit.times[4].measured(CHAIN(1), 0.0001)
    card.fit.times[4].measured(CHAIN(2), 0.00001)  # in a file, say, but captured it is not
    for _ in range(LOOK_EVERY):
        policy.observe(CHAIN(3), 0.001, [()], 1.0)
    assert policy.next() == CHAIN(1) and not card.measures


def test_a_tail_is_measured_once_its_rounds_took_long():
    card = learned()
    tail(card, 4)
    assert PLAIN not in {shape for _, shape in card.measures}
    card = learned()
    hold(card, 4, CHAIN(1))
    card.fit.times[4].decoded = TAIL_SECONDS - 0.001
    tail(card, 4)
    assert not card.measures
    card = learned()
    hold(card, 4, CHAIN(1))
    card.fit.times[4].decoded = TAIL_SECONDS
    assert tail(card, 4, left=20).next() == CHAIN(1) and not card.measures, "but not for few tokens"
    card = learned()
    hold(card, 4, CHAIN(1))
    card.fit.times[4].decoded = TAIL_SECONDS
    policy = tail(card, 4)
    assert (4, PLAIN) in card.measures and policy.next() != CHAIN(1)
    assert all(rows == 4 for rows, _ in card.measures)


def test_a_shape_is_captured_in_a_tail_when_what_was_lost_would_have_paid_for_it():
    """A chain of three gains some 5 % over one of five."""
    for decoded, captured in ((TAIL_SECONDS, False), (100 * TAIL_SECONDS, True)):
        card = learned()
        card.speed(20)
        hold(card, 4, CHAIN(5), CHAIN(1), PLAIN)
        card.measures.clear()
        card.fit.times[4].decoded = decoded
        policy = tail(card, 4)
        assert (policy.next() != CHAIN(5)) == captured == bool(card.measures)


def test_a_wish_of_a_tail_is_captured_in_the_pause():
    card = learned()
    hold(card, 4, CHAIN(1), PLAIN)
    times = card.fit.times[4]
    times.decoded, times.since = TAIL_SECONDS, 0
    policy = tail(card, 4)
    assert policy.next() == CHAIN(1)
    times.decoded, times.since = 1000.0, times.between
    for _ in range(LOOK_EVERY):
        policy.observe(CHAIN(1), card.seconds(CHAIN(1)), [()], 1.0)
    wish = policy.next()
    assert wish != CHAIN(1) and not card.measures
    tail(card, 4, policy)
    assert (4, wish) in card.measures and policy.next() in card.captured[4]


def test_plain_rounds_go_on_in_a_tail():
    card = Card(WRONG, rows=8, level=0.02)
    card.speed(8)
    card.measures.clear()
    assert tail(card, 2).next() == PLAIN and not card.measures and card.fit.last.keys() == {8}
    policy = tail(card, 2)
    for _ in range(40):
        policy.observe(PLAIN, 0.001, [()] * 2, 1.0)
    assert policy.next() == PLAIN and card.fit.times[2].step == 0.001


def test_a_scout_ends_where_a_tail_begins():
    card = Card(MODEL, rows=8, level=0.12)
    card.speed(8)
    times = card.fit.times[8]
    times.decoded, times.since, times.scouted = 1e6, times.between, 0
    policy = started(card)
    assert policy.next() == card.fit.scouts[8] != card.fit.last[8]
    tail(card, 4, policy)
    assert policy.next() == card.fit.last[8] and card.fit.scouts.keys() == {8}


def test_times_in_a_tail_are_those_of_its_fastest_first_rounds():
    times, shape = RoundTimes(2, False), CHAIN(2)
    for seconds in (0.009, 0.002, 0.004, 0.003):
        times.learn(shape, seconds)
    assert times.knows(shape) and times.known[shape.name] == (2, 2, 0.002) and STARTS_WITH == 4
    times.learn(shape, 0.003)
    assert 0.002 < times.known[shape.name][2] < 0.0025
    measured = RoundTimes(2, False)
    measured.measured(shape, 0.002)
    measured.learn(shape, 0.001)
    assert 0.0015 < measured.known[shape.name][2] < 0.002, "all rounds count if it was measured"


def fixed_speed(shape, calls=10, **options):
    """Tokens a second of all rounds of a fixed shape."""
    card, policy = Card(**options), FixedPolicy(shape, 5)
    original, cards.FittedPolicy = cards.FittedPolicy, lambda *_: policy
    try:
        return calls / sum(card.batch()[1] for _ in range(calls))
    finally:
        cards.FittedPolicy = original


@pytest.mark.parametrize(("level", "share", "slowest"), [(0.3, 0.85, 0.6), (0.4, 0.9, 0.6), (0.2, 0.85, 0.3)])
def test_shapes_are_chosen_by_how_long_all_rows_take(level, share, slowest, monkeypatch):
    """Long chains take few rounds for most rows, but for the slowest nearly as many."""
    options = dict(acceptance=[[share]], rows=32, level=level, free=9999, shapes="chain", ease=(1.1,) * 7 + (slowest,))
    fixed = max(fixed_speed(shape, 4, **options) for shape in (PLAIN, CHAIN(1), CHAIN(2), CHAIN(3)))
    speed = {}
    for learns in (True, False):
        card = Card(**options)
        if not learns:
            monkeypatch.setattr(IdleSlots, "add", lambda *_: None)
        for _ in range(10):
            card.batch()
        speed[learns] = 4 / sum(card.batch()[1] for _ in range(4))
    assert speed[True] > 0.95 * fixed > speed[False]


def test_what_idle_slots_lose_is_learned_for_the_first_rows_of_calls_and_counts_in_batches():
    card = learned()
    policy = started(card)
    assert policy.next() == CHAIN(3) and card.fit.idle.keys() == {8}
    hold(card, 8, CHAIN(1))
    card.fit.idle[8] = IdleSlots(lost=0.2, gained=1.0)
    assert started(card).next() == CHAIN(3), "at a look"
    policy = started(card)
    for _ in range(LOOK_EVERY):
        policy.observe(CHAIN(3), card.seconds(CHAIN(3)), [card.walk(CHAIN(3).tree) for _ in range(8)], 2.7)
    assert policy.next() == CHAIN(1)
    hold(card, 1, CHAIN(1), CHAIN(3))
    assert tail(card, 1, policy).next() == CHAIN(3), "a single row idles nowhere"


def test_what_is_believed_of_known_shapes_can_be_read():
    own = Fit(own=(6.0, 2.0))
    own.times_of(2).measured(DRAFTERS_OWN, 0.1)
    assert own.beliefs(2) == {"own": {"tokens": 3.0, "seconds": 0.1, "speed": pytest.approx(30.0)}}
    assert own.beliefs(4) == {}
    card = Card(CASES["heads"]["acceptance"], rows=4, deepest=5)
    card.speed(4)
    believed, known = card.fit.beliefs(4), card.fit.times[4].known
    assert believed.keys() == known.keys() > {PLAIN.name, card.fit.scouts[4].name}
    for name, of in believed.items():
        assert of["seconds"] == known[name][2] and of["speed"] == of["tokens"] / of["seconds"]
    wide, narrow = TokenTree.from_widths((4, 1)), TokenTree((None, 0, 1, 1, 1, 1, 1, 1, 1))
    assert shape_of(wide).name == shape_of(narrow).name
    for trees in ([wide, narrow], [narrow, wide]):
        card.fit.trees = [shape_of(tree) for tree in trees]
        card.fit.times[4].measured(shape_of(wide), 0.001)
        card.fit.idle[4] = IdleSlots(lost=0.1, gained=1.0)
        of = card.fit.beliefs(4)[shape_of(wide).name]
        assert of["tokens"] == card.fit.tokens(shape_of(wide), card.fit.counts.reach())
        assert of["speed"] == pytest.approx(of["tokens"] * (1 - 0.1 * (of["tokens"] - 1)) / 0.001)


def test_slots_cost_what_rounds_with_them_took():
    fit = Fit()
    for rows, seconds in ((8, 0.004), (2, 0.002)):
        fit.times_of(rows).measured(PLAIN, seconds)
    fit.times_of(8).measured(CHAIN(1), 0.005)
    fit.times_of(2).measured(CHAIN(2), 0.001)
    assert [fit.relative_seconds(rows, 8) for rows in (16, 8, 4, 2, 1)] == [1.0, 1.0, 1.0, 0.5, 0.5]
    fit.times_of(4).measured(PLAIN, 0.005)
    assert fit.relative_seconds(4, 8) == 1.0, "no more than with more rows"
    card = learned(fit=fit)
    policy = started(card)
    policy.finish([40, 40, 80, 80], [100] * 4)
    lost = 1 - 240 * 1 / 4 / (40 + 0.5 * 40)
    assert card.fit.idle[8].lost == pytest.approx(lost)
