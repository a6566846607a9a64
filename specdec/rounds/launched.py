"""Captured rounds, launched ahead of the host.

On a GPU the host launches a round before it reads the outcome of the one before, from one small tensor. Rows end on the
device at their limit and at end-of-text tokens. A row that a stopping criterion ends is marked as ended on the device,
and tokens that were drafted for it meanwhile are dropped. A policy may change the shape from round to round: if a round
of the new shape is captured, and draft models have seen the text, it is launched at once.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attention import OutOfPages
from specdec.cuda_graph import CannotCapture
from specdec.drafters import Drafter
from specdec.drafters.base import token_states
from specdec.drafters.reach import any_within
from specdec.planning.policy import PLAIN, Place, Shape
from specdec.planning.step_clock import StepClock, median_seconds
from specdec.requests.rows import Row, Rows
from specdec.rounds.captured import CapturedRound, CapturedRounds, session_in, take_all_pages
from specdec.rounds.flight import Flight
from specdec.rounds.records import Call
from specdec.rounds.round import run_eagerly

ROUNDS_IN_FLIGHT = 2  # launched but not yet read back
TIMED_STEPS = 4  # rounds that are timed together


@dataclass(frozen=True, slots=True)
class Launches:
    """The captured rounds of one call.

    room: tokens past a row's limit.
    max_length: tokens of the longest text that the drafter drafts for (None: no limit).
    """

    call: Call
    drafter: Drafter | None
    captured: CapturedRounds
    room: int
    max_length: int | None

    def wanted(self) -> Shape:
        """The shape that the policy wants; plain where no text is short enough for a draft."""
        return self.call.policy.next() if self.drafts() else PLAIN

    def drafts(self) -> bool:
        """Whether any active row can be drafted for."""
        return self.call.session is not None and any_within(self.call.rows.active, self.max_length)

    def place(self) -> Place:
        """What a policy may ask about the rows as they lie now."""
        call = self.call
        return Place(
            call.rows.size,
            left=lambda: max((row.limit - row.length for row in call.rows.active), default=0),
            captured=lambda shape: self.captured.held(self.drafter, call, shape) is not None,
            seconds=self._seconds,
        )

    def _seconds(self, shape: Shape) -> float:
        try:
            return median_seconds(*self.replays(shape))
        except (CannotCapture, OutOfPages):
            if shape == PLAIN:
                raise
            return math.inf

    def replays(self, shape: Shape | None) -> tuple[Callable[[], None], int]:
        """Captured rounds of `shape` that change no row, several launched before the host reads; see `Prepare`.

        shape: None: steps of the target alone."""
        call, captured = self.call, self.captured
        round = captured.target_step(call) if shape is None else captured.of(self.drafter, call, shape)
        take_all_pages(self.call.rows, self.room, None)
        return replays_of(round, self.call.rows)

    def following(self, active: Sequence[Row], round: CapturedRound,
                  shape: Shape) -> tuple[CapturedRound, Shape] | None:  # fmt: skip
        """What to launch after `round` of `shape` without a pause; None: there must be one, or half of the rows have
        ended."""
        call, wanted = self.call, self.wanted()
        if 2 * len(active) <= call.rows.size:
            return None
        if wanted == shape:
            return round, shape
        if token_states(call.session) and PLAIN in (wanted, shape):
            return None
        other = self.captured.held(self.drafter, call, wanted)
        if other is None or min(row.can_run_again for row in active) < other.min_length:
            return None
        return other, wanted


def replays_of(round: CapturedRound, rows: Rows) -> tuple[Callable[[], None], int]:
    """Launches of a captured round that change no row, several before the host reads; see `Prepare`."""
    alive = rows.alive.clone()

    def replay() -> None:
        rows.alive.zero_()
        for copy in [round.launch() for _ in range(TIMED_STEPS)]:
            copy.read()
        rows.alive.copy_(alive)

    return replay, TIMED_STEPS


def run_captured(call: Call, drafter: Drafter | None, captured: CapturedRounds, room: int,
                 clock: StepClock | None) -> float | None:  # fmt: skip
    """Run all remaining rounds, launched ahead of the host -> the seconds of a plain step, if `clock` timed one.

    Leaves the rest to eager rounds if a round cannot be captured or not all pages can be taken."""
    launches = Launches(call, drafter, captured, room, None if drafter is None else drafter.traits.max_length)
    step, states = None, token_states(call.session)
    behind = call.records[call.rows.active[0]].shapes[-1] == PLAIN  # draft models have not seen all tokens
    while active := call.rows.active:
        started = time.perf_counter()
        try:
            _move_together(call, captured, active)
            if launches.drafts():
                call.policy.enter(launches.place())
            shape = launches.wanted()
            catches_up = behind and shape != PLAIN and bool(states)
            if shape == PLAIN and not behind:
                _forget_drafts(call)
            round = None if catches_up else captured.of(drafter, call, shape)
            ready = round is not None and min(row.can_run_again for row in active) >= round.min_length
            if ready and clock is not None and step is None:
                lengths = [row.length for row in active]
                step = clock.measure("device", call.rows.target.mode, lengths, lambda: launches.replays(None))
            if ready:
                take_all_pages(call.rows, room, session_in(call, shape))
        except (CannotCapture, OutOfPages) as error:
            call.fallback_reason = str(error)
            if isinstance(error, CannotCapture):
                call.rows.target.fall_back(error)
            else:
                call.fallback_reason = f"not all pages could be taken beforehand: {error}"
            hand_back(call)
            return step
        finally:
            call.excluded += time.perf_counter() - started
        if round is not None and ready:
            shape = _replay(launches, round, shape)
        else:
            hand_back(call)
            run_eagerly(call, usual=not catches_up)
        behind = shape == PLAIN
    return step


def _replay(launches: Launches, round: CapturedRound, shape: Shape) -> Shape:
    """Launch `round`, and what the policy wants after it, until there must be a pause -> the last shape.

    On a GPU an outcome is read after the next round is launched. Rounds with drafts are launched until no text is short
    enough for one."""
    call, rows = launches.call, launches.call.rows
    in_flight, criteria = rounds_in_flight(rows), any(row.criteria for row in rows.active)
    if criteria:
        call.fallback_reason, in_flight = "a stopping criterion runs on the host after every round", 1
    flight = Flight(call, launches.max_length)
    while (active := rows.active) and (flight or launches.following(active, round, shape)):
        while len(flight) < in_flight and (coming := launches.following(active, round, shape)):
            if flight.ends_all(active):
                break
            round, shape = coming
            flight.launch(round, shape, active)
        flight.land()
        if criteria and len(rows.active) < len(active):
            rows.end([row for row in active if row.ended])
    return shape


def rounds_in_flight(rows: Rows) -> int:
    """Rounds that may be launched before the first of them is read: a CPU would only compute one round too many."""
    return ROUNDS_IN_FLIGHT if rows.tokens.is_cuda else 1


def _move_together(call: Call, captured: CapturedRounds, active: Sequence[Row]) -> None:
    """Put the active rows into the first slots of the smallest `Rows` that can hold them."""
    fewer = captured.rows(call.request, call.rows.target.slots_for(len(active)), call.rows.tokens.shape[1])
    if fewer is not call.rows or [row.slot for row in active] != list(range(len(active))):
        fewer.take_over(call.rows, active)
        call.rows = fewer


def hand_back(call: Call) -> None:
    """Prepare the active rows for eager rounds: drop unused pages, and tokens that a draft model may not have seen."""
    active, cache = call.rows.active, call.rows.target.cache
    for row in active:
        cache.truncate(row.sequence, min(cache.length(row.sequence), row.length - 1))
    _forget_drafts(call)


def _forget_drafts(call: Call) -> None:
    """Drop the tokens at the end of the active rows that draft models may not have seen, or that were rejected.

    Rows whose prompt still runs have had no draft."""
    cache = call.rows.target.cache
    active = [row for row in call.rows.active if cache.length(row.sequence) >= row.length - 1]
    for state in call.session.states if call.session else ():
        state.truncate(active, [max(row.fixed, row.length - call.policy.max_tokens - 1) for row in active])
