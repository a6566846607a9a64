"""Captured rounds: a round as one function of tensors, which a CUDA graph replays.

The host launches a round before it has read the outcome of the one before, and so reads one round late, from one
small tensor. Rows end on the device at their limit and at end-of-text tokens. A row that the host ends (a stopping
criterion) is marked as ended on the device, and what was drafted for it meanwhile is dropped.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attention import OutOfPages
from specdec.cuda_graph import ByIdentity, CannotCapture, CapturedGraph, GraphCache, HostCopy
from specdec.drafters import Drafter, DraftSession
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, FixedPolicy, Policy, Shape
from specdec.requests.batch import Batch
from specdec.requests.request import Request
from specdec.requests.rows import Row, Rows
from specdec.rounds.records import Call, end_round, record_round
from specdec.rounds.round import Round, run_eagerly
from specdec.rounds.verify import ResultLayout

ROUNDS_IN_FLIGHT = 2  # launched but not yet read back
TIMED_STEPS = 4  # plain steps that are timed in a row
MIN_CAPACITY = 512  # tokens of a row, then powers of two: texts of similar lengths share a graph


class CapturedRound:
    """`round` over all slots of `rows`: captured once, launched again and again."""

    def __init__(self, round: Round, rows: Rows, runners: Sequence[ModelRunner], min_length: int):
        self.rows, self.runners, self.min_length = rows, tuple(runners), min_length
        self.layout: ResultLayout | None = None
        self._round = round
        target = rows.target
        rows.alive.zero_()  # the runs before a capture change nothing that stays
        self._graph = CapturedGraph(self._run, target.device, target.graph_pool, f"a round of {target.name}")

    @torch.inference_mode()
    def _run(self) -> Tensor:
        packed, self.layout = self._round(Batch(self.rows))
        return packed

    def launch(self) -> HostCopy:
        """Run one round of all rows."""
        return HostCopy(self._graph())


class CapturedRounds:
    """The rounds that a generator has captured, the rows that they run over, and whether a call can run with them."""

    MAX_ROUNDS, MAX_ROWS = 32, 8

    def __init__(self, target: ModelRunner):
        self._target, self._rounds, self._rows = target, GraphCache(self.MAX_ROUNDS), GraphCache(self.MAX_ROWS)

    def drop_graphs(self) -> None:
        """Drop them all: called by the runners whose models they run."""
        self._rounds.clear()
        self._rows.clear()

    def fallback_reason(self, drafter: Drafter | None, request: Request, policy: Policy) -> str | None:
        """Why the host must take part in every round of this call; None: it need not."""
        if self._target.mode == "eager":
            return 'the target runs with mode="eager"'
        if not isinstance(policy, FixedPolicy):
            return "the shape of each round is chosen from what the rounds before gave"
        if drafter is not None and not drafter.traits.captured:
            return f"a {type(drafter).__name__} asks the host in every round"
        if request.processors.ask_host:
            return f"logits processors look at the text or ask the device: {', '.join(request.processors.ask_host)}"
        return None

    def rows(self, request: Request, count: int, capacity: int) -> Rows:
        """Rows for `count` rows of `request` of up to `capacity` tokens, or somewhat more of both; what they hold is of
        another call."""
        ends, numbers = max(1, len(request.eos)), len(request.processors.numbers)
        key = up_to_power(count), max(MIN_CAPACITY, up_to_power(capacity)), up_to_power(ends), numbers
        return self._rows.get(key, lambda: Rows(self._target, *key))

    def of(self, drafter: Drafter | None, session: DraftSession | None, call: Call, shape: Shape) -> CapturedRound:
        """A captured round of `call`'s rows. Raises CannotCapture."""
        rows, request, plain = call.rows, call.request, session is None or shape == PLAIN
        own = None if plain else (ByIdentity(drafter), session.reads)
        settings = request.do_sample, request.processors.warpers, call.features
        key = own, shape, ByIdentity(rows), ByIdentity(call.rule), *settings
        return self._rounds.get(key, lambda: self._make(None if plain else session, call, shape))

    def _make(self, session: DraftSession | None, call: Call, shape: Shape) -> CapturedRound:
        runners = [call.rows.target, *(state.runner for state in (session.states if session else ()))]
        min_length = 1 if session is None else session.min_length(shape.tree)
        alive = call.rows.alive.clone()
        try:
            made = CapturedRound(Round(call.rule, session, shape, call.features), call.rows, runners, min_length)
        finally:
            call.rows.alive.copy_(alive)
        for runner in runners:
            runner.graph_holders.add(self)
        return made


def up_to_power(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def run_captured(
    call: Call, drafter: Drafter | None, captured: CapturedRounds, room: int, time_step: Callable | None
) -> float | None:
    """All rounds that are left, launched ahead of the host -> the seconds of a plain step, where `time_step` timed one.

    Leaves rows to eager rounds where something cannot be captured or not all pages can be taken.
    """
    step = None
    while active := call.rows.active:
        shape = PLAIN if call.session is None else call.policy.next()
        started = time.perf_counter()
        try:
            _move_together(call, captured, active)
            round = captured.of(drafter, call.session, call, shape)
            ready = min(row.length for row in active) >= round.min_length
            if ready and time_step is not None and step is None:
                size = "device", call.rows.target.mode, len(active), max(row.length for row in active).bit_length()
                step = time_step(size, lambda: _plain_steps(call, captured, room))
            if ready:
                take_all_pages(call.rows, room, None if shape == PLAIN else call.session)
        except (CannotCapture, OutOfPages) as error:
            if isinstance(error, CannotCapture):
                call.rows.target.fall_back(error)
            out = isinstance(error, OutOfPages)
            call.fallback_reason = f"not all pages could be taken beforehand: {error}" if out else str(error)
            _hand_back(call)
            return step
        finally:
            call.excluded += time.perf_counter() - started
        if ready:
            _replay(call, round, shape)
        else:
            run_eagerly(call)
    return step


def _replay(call: Call, round: CapturedRound, shape: Shape) -> None:
    """Launch `round` until half of its rows have ended, reading each outcome after the next round is launched."""
    rows, last = call.rows, time.perf_counter()
    in_flight = ROUNDS_IN_FLIGHT
    if call.request.criteria:
        call.fallback_reason, in_flight = "a stopping criterion is asked after every round, in Python", 1
    pending: deque[HostCopy] = deque()
    while (active := rows.active) and (pending or 2 * len(active) > rows.size):
        # rounds in flight may already bring every row to its limit
        while (
            len(pending) < in_flight
            and 2 * len(active) > rows.size
            and any(row.length + len(pending) < row.limit for row in active)
        ):
            pending.append(round.launch())
        packed = pending.popleft().read()
        record_round(call, active, round.layout, [packed[row.slot] for row in active])
        now = time.perf_counter()
        end_round(call, active, shape, now - last)
        last = now
        if call.request.criteria and len(rows.active) < len(active):
            rows.end([row for row in active if row.ended])


def _move_together(call: Call, captured: CapturedRounds, active: Sequence[Row]) -> None:
    """Put the active rows into the first slots of as few slots as hold them."""
    fewer = captured.rows(call.request, len(active), call.rows.tokens.shape[1])
    if fewer is not call.rows or [row.slot for row in active] != list(range(len(active))):
        fewer.take_over(call.rows, active)
        call.rows = fewer


def take_all_pages(rows: Rows, room: int, session: DraftSession | None) -> None:
    """Take all pages that the active rows may ever need, since captured rounds cannot ask for more, and write the block
    tables. `room`: tokens past a row's limit; `session`: of a drafter that takes part (None: of none)."""
    active, cache = rows.active, rows.target.cache
    live = [row.sequence for row in active]
    cache.append(live, [max(0, row.limit + room - cache.length(row.sequence)) for row in active])
    rows.memory(rows.target).load(live, [row.length for row in active])
    for state in session.states if session else ():
        rows.memory(state.runner, state.draft_room).load(state.with_all_pages(active), [0] * len(active))


def _hand_back(call: Call) -> None:
    """Leave the active rows to eager rounds: without the pages that were taken beforehand, and without what a draft
    model's cache may hold of other tokens."""
    active, cache = call.rows.active, call.rows.target.cache
    for row in active:
        cache.truncate(row.sequence, min(cache.length(row.sequence), row.length - 1))
    for state in call.session.states if call.session else ():
        state.truncate(active, [max(0, row.length - call.policy.max_tokens - 1) for row in active])


def _plain_steps(call: Call, captured: CapturedRounds, room: int) -> tuple[Callable[[], None], int]:
    """Captured plain steps that change no row, launched as rounds are: several before the host reads."""
    plain = captured.of(None, None, call, PLAIN)
    take_all_pages(call.rows, room, None)
    rows, alive = call.rows, call.rows.alive.clone()

    def steps() -> None:
        rows.alive.zero_()
        for copy in [plain.launch() for _ in range(TIMED_STEPS)]:
            copy.read()
        rows.alive.copy_(alive)

    return steps, TIMED_STEPS
