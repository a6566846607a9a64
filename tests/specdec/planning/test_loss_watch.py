"""A fixed shape that is slower than plain steps is named once, with the numbers."""

import pytest

from specdec.planning.loss_watch import LEAST_ROUNDS, LossWatch, warn_of_loss


def test_it_waits_for_enough_rounds_and_speaks_once_for_each_batch():
    watch, half = LossWatch(), LEAST_ROUNDS // 2
    slow = dict(seconds=[0.02] * half, tokens=[1.5] * half, step=0.01)
    assert watch.add("a chain of 5", 4, **slow) is None
    assert watch.add("a chain of 5", 2, **slow) is None
    said = watch.add("a chain of 5", 4, **slow)
    assert said == (
        "a chain of 5 at batch 4 takes 20.0 ms a round for 1.5 tokens; plain steps take 10.0 ms each: 0.75x of plain"
    )
    assert watch.add("a chain of 5", 4, **slow) is None and watch.add("a chain of 5", 4, **slow) is None
    assert watch.add("a chain of 5", 2, **slow) is not None


def test_it_is_silent_for_gains_and_for_noise():
    watch = LossWatch()
    hiccups = [0.015] * LEAST_ROUNDS + [3.0] * (LEAST_ROUNDS // 2)
    assert watch.add("a chain of 2", 1, hiccups, [1.6] * len(hiccups), 0.01) is None
    assert watch.add("a chain of 2", 2, [0.004] * LEAST_ROUNDS, [1.0] * LEAST_ROUNDS, 0.0009) is None, "too short"
    assert watch.add("a chain of 2", 8, [0.0154] * LEAST_ROUNDS, [1.5] * LEAST_ROUNDS, 0.01) is None, "too close"


def test_the_warning_says_what_else_to_use():
    with pytest.warns(UserWarning, match='^so and so; use a smaller tree or tree="auto"$'):
        warn_of_loss("so and so", "a smaller tree")
