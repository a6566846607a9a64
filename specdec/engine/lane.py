"""Captured rounds of a group, launched ahead of the host, over slots that requests come to and leave."""

import math
from collections.abc import Hashable, Sequence

from attention import OutOfPages
from specdec.cuda_graph import CannotCapture
from specdec.drafters import Drafter, DraftSession
from specdec.drafters.base import readers_of, token_states
from specdec.planning.policy import PLAIN, Shape
from specdec.planning.step_clock import median_seconds
from specdec.requests.rows import Row, Rows
from specdec.rounds.captured import CapturedRound, CapturedRounds, session_in, take_pages
from specdec.rounds.flight import Flight
from specdec.rounds.launched import hand_back, replays_of, rounds_in_flight
from specdec.rounds.records import Call, Failed


def up_to_half_power(number: int) -> int:
    """The least power of two, or half of one more, that is at least `number`: few sizes of captured rounds.

    >>> [up_to_half_power(n) for n in (1, 3, 5, 7, 33, 49)]
    [1, 3, 6, 8, 48, 64]
    """
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if power > 2 and number <= power * 3 // 4 else power


class Lane:
    """The captured rounds of `call`, whose rows are of the kind `kind`.

    room: tokens past a row's limit.
    landed: rows of which a round has been read, until `take_landed`.
    """

    def __init__(self, call: Call, drafter: Drafter | None, captured: CapturedRounds, kind: Hashable, room: int,
                 failed: Failed):  # fmt: skip
        self._call, self._drafter, self._captured, self._kind, self._room = call, drafter, captured, kind, room
        self._flight = Flight(call, None if drafter is None else drafter.traits.max_length, failed)
        self._landed: list[Row] = []
        self._disturbed = 0  # rounds whose time tells nothing
        self._last: Shape | None = None  # of the round before, if it was captured
        self._reads_all = False  # in this step, whose rows all end in the rounds in flight
        call.fallback_reason = captured.fallback_reason(drafter, call.rule, call.request, call.policy)

    @property
    def open(self) -> bool:
        """Whether rounds can be captured."""
        return self._call.fallback_reason is None

    @property
    def busy(self) -> bool:
        """Whether rounds are in flight."""
        return bool(self._flight)

    def fitting_rows(self, count: int, length: int) -> Rows:
        """Slots for `count` rows of up to `length` tokens: the present ones, unless others fit better."""
        now, slots = self._call.rows, up_to_half_power(max(count, 1))
        most = 2 * slots if now.tokens.is_cuda or not self.open else slots + 1  # a CPU computes each empty slot
        if slots <= now.size < most and length <= now.tokens.shape[1]:
            return now
        return self._captured.rows(self._call.request, slots, max(length, now.tokens.shape[1]), self._kind)

    def launch(self, rows: Sequence[Row], shape: Shape) -> bool:
        """Launch a round of `rows`, all that are awake -> whether that was possible; else none is in flight.

        Rows that have ended in rounds read meanwhile take no part. Where all end in the rounds in flight nothing is
        launched, and `read` waits for these: after the step's other work has been launched."""
        call = self._call
        if self.pause_before(shape):
            rows = [row for row in rows if not row.ended]
            if not rows:
                return True
        try:
            round = self._ready(rows, shape)
        except OutOfPages:
            round = None
        except Exception as error:  # a draft's own may end a request: a round on the host tells of which
            self.stop()
            if isinstance(error, CannotCapture):
                call.rows.target.fall_back(error)
            call.fallback_reason = str(error)
            return False
        if round is None:
            self.stop()
            return False
        self._last = shape
        self._reads_all = self._flight.ends_all(rows)
        if not self._reads_all:
            call.rows.features_valid = call.rows.features is not None
            self._flight.launch(round, shape, rows)
        return True

    def pause_before(self, shape: Shape) -> bool:
        """Read all rounds in flight if draft models lack what they bring, or go on without drafts -> whether so."""
        states = token_states(self._call.session)
        if not states or self._last is None or PLAIN not in (shape, self._last) or shape == self._last:
            return False
        self.stop()
        return True

    def _ready(self, rows: Sequence[Row], shape: Shape) -> CapturedRound | None:
        """The captured round for `rows`, which have their pages; None: some text is too short for it."""
        call = self._call
        if readers_of(call.session) and call.rows.features is None:  # all texts are
            return None
        round = self._captured.of(self._drafter, call, shape)
        if any(row.length < round.min_length for row in rows):
            return None
        self._take_pages(rows, session_in(call, shape))
        return round

    def holds(self, shape: Shape) -> bool:
        """Whether a round of `shape` is captured for the present slots."""
        return self.open and self._captured.held(self._drafter, self._call, shape) is not None

    def seconds(self, shape: Shape, rows: Sequence[Row]) -> float:
        """Of a captured round of `shape`, measured by replays that change no row; infinity: it cannot be captured.

        Pages that it takes are given back: the next round of some rows may be one of the host."""
        self.settle()
        rows = [row for row in rows if not row.ended]
        session = session_in(self._call, shape)
        caches = [runner.cache for runner in self._call.runners]
        held = [(cache, sequence, cache.length(sequence)) for cache in caches for sequence in cache.sequences]
        try:
            round = self._captured.of(self._drafter, self._call, shape)
            self._take_pages(rows, session)
            return median_seconds(*replays_of(round, self._call.rows))
        except (CannotCapture, OutOfPages):
            return math.inf
        finally:
            for cache, sequence, length in held:
                cache.truncate(sequence, length)

    def _take_pages(self, rows: Sequence[Row], session: DraftSession | None) -> None:
        reach = [row.reach for row in rows]
        for table, sequences in take_pages(self._call.rows, rows, reach, self._room, session):
            table.follow([row.slot for row in rows], sequences)

    def settle(self) -> None:
        """Read all rounds in flight."""
        while self._flight:
            self._land()

    def disturb(self) -> None:
        """Note that other work runs beside this step's round, whose time then tells nothing."""
        self._disturbed = rounds_in_flight(self._call.rows)

    def read(self) -> None:
        """Read what need not stay in flight while the device works on the next round."""
        at_once = self._reads_all or any(row.criteria for row in self._call.rows.members)
        keep, self._reads_all = 0 if at_once else rounds_in_flight(self._call.rows) - 1, False
        while len(self._flight) > keep:
            self._land()

    def stop(self) -> None:
        """Read all rounds in flight, and prepare their rows for eager ones."""
        self.settle()
        if self._last is not None:
            hand_back(self._call)
        self._last = None

    def drop(self) -> None:
        """Forget what is in flight, after a failure."""
        self._flight.drop()
        self._reads_all = False

    def _land(self) -> None:
        self._landed += self._flight.land(usual=not self._disturbed)
        self._disturbed = max(0, self._disturbed - 1)

    def take_landed(self) -> list[Row]:
        """The rows of which a round has been read since the last call."""
        landed, self._landed = self._landed, []
        return landed
