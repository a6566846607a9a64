"""Captured rounds in flight: launched, and not read yet."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.cuda_graph import HostCopy
from specdec.drafters.reach import any_within
from specdec.planning.policy import PLAIN, Shape
from specdec.requests.rows import Row
from specdec.rounds.captured import CapturedRound
from specdec.rounds.records import Call, Failed, end_round, record_round


@dataclass(frozen=True, slots=True)
class _Launched:
    """slots: of the rows that took part, as they lay then; tokens: the most that a row may get."""

    copy: HostCopy
    round: CapturedRound
    shape: Shape
    slots: dict[Row, int]
    tokens: int
    started: float


class Flight:
    """The rounds of `call` that are in flight, read in the order of their launch.

    max_length: tokens of the longest text that is drafted for (None: no limit).
    failed: called with rows whose round an exception ended, and that exception (None: it is raised).
    """

    def __init__(self, call: Call, max_length: int | None = None, failed: Failed | None = None):
        self._call, self._max_length, self._failed = call, max_length, failed
        self._pending: deque[_Launched] = deque()
        self._landed = 0.0

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def shape(self) -> Shape | None:
        """That of the last round that was launched; None: it is read."""
        return self._pending[-1].shape if self._pending else None

    def ends_all(self, rows: Sequence[Row]) -> bool:
        """Whether the rounds in flight bring every row to its limit."""
        return all(row.length + sum(row in one.slots for one in self._pending) >= row.limit for row in rows)

    def launch(self, round: CapturedRound, shape: Shape, rows: Sequence[Row]) -> None:
        """Launch a round in which `rows` take part."""
        if shape != PLAIN:
            self._call.most_new = round.min_length
        slots, tokens, started = {row: row.slot for row in rows}, round.layout.most_emitted, time.perf_counter()
        self._pending.append(_Launched(round.launch(), round, shape, slots, tokens, started))
        for row in rows:
            row.ahead += tokens

    def land(self, usual: bool = True) -> list[Row]:
        """Read and record the oldest round -> its rows, but for those that have ended or left meanwhile.

        usual: whether its time says how long rounds of its shape take."""
        one = self._pending.popleft()
        packed, call = one.copy.read(), self._call
        for row in one.slots:
            row.ahead -= one.tokens
        rows = [row for row in one.slots if not row.ended and row.sequence >= 0]
        drafted = any_within(rows, self._max_length)
        paths = record_round(call, rows, one.round.layout, [packed[one.slots[row]] for row in rows], self._failed)
        if (states := call.rows.target.cache.states) is not None:
            going = [row for row in rows if not row.ended]
            states.moved_to([row.sequence for row in going], [row.length - 1 for row in going])
        now = time.perf_counter()
        seconds, self._landed = now - max(self._landed, one.started), now
        kept = [row for row, path in zip(rows, paths, strict=True) if path is not None]
        end_round(call, kept, one.shape if drafted else PLAIN, seconds, usual)
        return rows

    def drop(self) -> None:
        """Forget all rounds in flight."""
        for one in self._pending:
            for row in one.slots:
                row.ahead -= one.tokens
        self._pending.clear()
