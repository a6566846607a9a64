"""Each size of batch is timed once, by the median of calls that may run several steps."""

import time
from itertools import accumulate

from specdec.planning import step_clock
from specdec.planning.step_clock import REPEATS, StepClock


def test_a_step_is_the_median_call_divided_by_its_steps_and_timed_once(monkeypatch):
    seconds = [8.0, 2.0, 4.0, 100.0, 6.0]  # of the timed calls
    assert len(seconds) == REPEATS
    monkeypatch.setattr(step_clock, "REPEATS", REPEATS)  # that of the other tests is lower, see conftest.py
    ends = [t for end, took in zip(accumulate(seconds), seconds, strict=True) for t in (end - took, end)]
    ticks = iter([0.0, *ends, 121.0])  # of all calls together
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock, calls = StepClock(), []
    for _ in range(2):
        assert clock.measure("host", "eager", [5, 9], lambda: (lambda: calls.append(1), 2)) == 3.0
    assert len(calls) == 1 + REPEATS and clock.seconds == {("host", "eager", 2, 4): 3.0}
    assert clock.spent == 121.0
