"""What a batch loses to slots of rows that have ended."""

import random

import pytest

from specdec.planning.idle_slots import KEPT, IdleSlots, share_at_work


@pytest.mark.parametrize("cost", [float, lambda slots: 3.0 + slots])
def test_the_share_is_that_of_rounds_simulated_one_by_one(cost):
    draws = random.Random(0)
    for count in (1, 2, 3, 7, 8, 32):
        rounds = [draws.randrange(1, 30) for _ in range(count)]
        slots = [1 << (sum(end > now for end in rounds) - 1).bit_length() for now in range(max(rounds))]
        each = cost(1 << (count - 1).bit_length()) / (1 << (count - 1).bit_length())  # of a row in full slots
        expected = sum(rounds) * each / sum(map(cost, slots))
        assert share_at_work(rounds, cost) == pytest.approx(expected)


def test_the_loss_for_each_accepted_token_is_learned():
    """As 1 - share(rounds) / share(tokens) = loss x (tokens a round - 1)."""
    idle, tokens = IdleSlots(), [128] * 4
    assert idle.per_token == 0.0 and idle.useful(3.0) == 3.0
    rounds = [40, 60, 64, 64]  # 228 of 248 slots at work, for 512 tokens
    for _ in range(100):
        idle.add(rounds, tokens)
    loss = (1 - 228 / 248) / (512 / 228 - 1)
    assert idle.per_token == pytest.approx(loss, rel=1e-3) and idle.useful(3.0) == pytest.approx(3 * (1 - 2 * loss))
    assert IdleSlots(lost=1.0, gained=1.0).useful(4.0) == 2.0, "half of the tokens at least"


def test_calls_are_smoothed():
    idle = IdleSlots()
    idle.add([40, 60, 64, 64], [128] * 4)
    once = idle.per_token
    assert once == pytest.approx((1 - 228 / 248) / (KEPT + 512 / 228 - 1))
    idle.add([64, 64, 64, 64], [128] * 4)
    assert 0 < idle.per_token < once


def test_shorter_texts_are_not_held_against_drafts():
    idle = IdleSlots()
    idle.add([10, 20, 40, 80], [20, 40, 80, 160])
    assert idle == IdleSlots(lost=0.0, gained=1.9) and idle.per_token == 0.0
    idle.add([40, 40, 40, 80], [20, 80, 160, 160])  # by chance less idle than plain decoding
    assert idle.lost < 0 and idle.per_token == 0.0 and idle.useful(3.0) == 3.0


def test_single_rows_and_calls_with_few_accepted_tokens_tell_nothing():
    idle = IdleSlots()
    idle.add([40], [128])
    idle.add([90, 100], [100, 100])
    idle.add([], [])
    assert idle == IdleSlots()
    idle.add([50, 100], [100, 100])
    assert idle != IdleSlots()
