"""Captured rounds: a round as one function of tensors, which a CUDA graph replays.

On a GPU the host launches a round before it reads the outcome of the one before, from one small tensor. Rows end on the
device at their limit and at end-of-text tokens. A row that a stopping criterion ends is marked as ended on the device,
and tokens that were drafted for it meanwhile are dropped.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attention import OutOfPages
from specdec.acceptance import AcceptanceRule
from specdec.acceptance.base import is_built_in
from specdec.cuda_graph import ByIdentity, CannotCapture, GraphCache, HostCopy, up_to_power
from specdec.drafters import Drafter, DraftSession
from specdec.drafters.base import runners_of
from specdec.drafters.reach import any_within
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, Policy, Shape
from specdec.planning.step_clock import StepClock
from specdec.requests.batch import Batch
from specdec.requests.request import Request
from specdec.requests.rows import Row, Rows
from specdec.rounds.records import Call, end_round, record_round
from specdec.rounds.round import Round, run_eagerly
from specdec.rounds.verify import ResultLayout

ROUNDS_IN_FLIGHT = 2  # launched but not yet read back
TIMED_STEPS = 4  # plain steps that are timed together
MIN_CAPACITY = 512  # tokens of a row; longer ones take powers of two, so that texts of similar lengths share graphs


class CapturedRound:
    """`round` over all slots of `rows`, captured once and launched many times."""

    layout: ResultLayout  # set by the first run

    def __init__(self, round: Round, rows: Rows, min_length: int):
        self.rows, self.min_length, self._round = rows, min_length, round
        target, alive = rows.target, rows.alive.clone()
        rows.alive.zero_()  # the runs before the capture must change no row
        try:
            self._graph = target.capture(self._run, "a round")
            self.bytes = self._graph.bytes
        finally:
            rows.alive.copy_(alive)

    @torch.inference_mode()
    def _run(self) -> Tensor:
        packed, self.layout = self._round(Batch(self.rows, most_new=self.min_length))
        return packed

    def launch(self) -> HostCopy:
        """Run one round of all rows."""
        return HostCopy(self._graph())


class CapturedRounds:
    """The rounds that a generator has captured, and the rows that they run over."""

    MAX_ROUNDS, MAX_ROWS = 32, 8

    def __init__(self, target: ModelRunner):
        self._target, self._rows = target, GraphCache(self.MAX_ROWS)
        self._rounds = GraphCache(self.MAX_ROUNDS, lambda round: round.bytes)

    def drop_graphs(self) -> None:
        """Drop all rounds and rows; called by the runners whose models they run."""
        self._rounds.clear()
        self._rows.clear()

    def fallback_reason(self, drafter: Drafter | None, rule: AcceptanceRule, request: Request,
                        policy: Policy) -> str | None:  # fmt: skip
        """Why this call's rounds cannot be captured; None: they can."""
        if self._target.mode == "eager":
            return 'the target runs with mode="eager"'
        if not policy.few_shapes:
            return "the shape of each round depends on the outcome of the rounds before"
        if self._target.auto and self._target.device.type == "cpu" and not is_built_in(rule):
            return 'an acceptance rule of your own may be more than a function of tensors; mode="graph" records it'
        if self._target.auto and any(runner.hooked for runner in runners_of(drafter)):
            return "a draft model has hooks, which replays would not call"
        if drafter is not None and not drafter.traits.captured:
            return f"a {type(drafter).__name__} needs the host in every round"
        if request.outputs:
            return f"output_{' and output_'.join(request.outputs)} are kept by the host in every round"
        if request.processors.need_host:
            names = ", ".join(request.processors.need_host)
            return f"logits processors of a kind, or in an order, that needs the host: {names}"
        return None

    def rows(self, request: Request, count: int, capacity: int) -> Rows:
        """Slots for at least `count` rows of `request` of at least `capacity` tokens, with another call's contents."""
        ends, numbers = max(1, len(request.eos)), len(request.processors.numbers)
        key = self._target.slots_for(count), max(MIN_CAPACITY, up_to_power(capacity)), up_to_power(ends), numbers
        return self._rows.get(key, lambda: Rows(self._target, *key))

    def of(self, drafter: Drafter | None, session: DraftSession | None, call: Call, shape: Shape) -> CapturedRound:
        """A captured round of `call`'s rows. Raises CannotCapture."""
        if shape == PLAIN:
            session = None
        own = None if session is None else (ByIdentity(drafter), session.reads)
        settings = call.request.do_sample, call.request.processors.kinds(), call.features
        key = own, shape, ByIdentity(call.rows), ByIdentity(call.rule), *settings
        return self._rounds.get(key, lambda: self._make(session, call, shape))

    def _make(self, session: DraftSession | None, call: Call, shape: Shape) -> CapturedRound:
        runners = [call.rows.target, *(state.runner for state in (session.states if session else ()))]
        min_length = 1 if session is None else session.min_length(shape.tree)
        round = Round(call.rule, session, shape, call.features, call.policy.max_tokens)
        made = CapturedRound(round, call.rows, min_length)
        for runner in runners:
            runner.graph_holders.add(self)
        return made


def run_captured(call: Call, drafter: Drafter | None, captured: CapturedRounds, room: int,
                 clock: StepClock | None) -> float | None:  # fmt: skip
    """Run all remaining rounds, launched ahead of the host -> the seconds of a plain step, if `clock` timed one.

    Leaves the rest to eager rounds if a round cannot be captured or not all pages can be taken."""
    step, max_length = None, None if drafter is None else drafter.traits.max_length
    behind = call.records[call.rows.active[0].number].shapes[-1] == PLAIN.name  # draft models have not seen all tokens
    while active := call.rows.active:
        drafts = call.session is not None and any_within(active, max_length)
        shape = call.policy.next() if drafts else PLAIN
        states = call.session.states if call.session is not None else ()
        if behind and shape != PLAIN and states:
            _hand_back(call)
            run_eagerly(call, usual=False)
            behind = False
            continue
        if shape == PLAIN and not behind:
            _forget_drafts(call)
        started = time.perf_counter()
        try:
            _move_together(call, captured, active)
            round = captured.of(drafter, call.session, call, shape)
            ready = min(row.length for row in active) >= round.min_length
            if ready and clock is not None and step is None:
                lengths = [row.length for row in active]
                step = clock.measure(
                    "device", call.rows.target.mode, lengths, lambda: _plain_steps(call, captured, room)
                )
            if ready:
                take_all_pages(call.rows, room, None if shape == PLAIN else call.session)
        except (CannotCapture, OutOfPages) as error:
            call.fallback_reason = str(error)
            if isinstance(error, CannotCapture):
                call.rows.target.fall_back(error)
            else:
                call.fallback_reason = f"not all pages could be taken beforehand: {error}"
            _hand_back(call)
            return step
        finally:
            call.excluded += time.perf_counter() - started
        if ready:
            _replay(call, round, shape, max_length)
        else:
            run_eagerly(call)
        behind = shape == PLAIN
    return step


def _replay(call: Call, round: CapturedRound, shape: Shape, max_length: int | None) -> None:
    """Launch `round` until half of its rows have ended, or the policy wants another shape.

    On a GPU an outcome is read after the next round is launched. Rounds with drafts are launched until no text is short
    enough for one, with at most `max_length` tokens."""
    rows, last = call.rows, time.perf_counter()

    def goes_on(active: Sequence[Row]) -> bool:
        drafts = call.session is not None and any_within(active, max_length)
        wanted = call.policy.next() if drafts else PLAIN
        return 2 * len(active) > rows.size and shape == wanted

    in_flight = ROUNDS_IN_FLIGHT if rows.tokens.is_cuda else 1  # a CPU would only compute one round too many
    if call.request.criteria:
        call.fallback_reason, in_flight = "a stopping criterion runs on the host after every round", 1
    pending: deque[HostCopy] = deque()
    while (active := rows.active) and (pending or goes_on(active)):
        while len(pending) < in_flight and goes_on(active):
            if all(row.length + len(pending) >= row.limit for row in active):
                break  # the rounds in flight bring every row to its limit
            pending.append(round.launch())
        packed, drafted = pending.popleft().read(), any_within(active, max_length)
        record_round(call, active, round.layout, [packed[row.slot] for row in active])
        now = time.perf_counter()
        end_round(call, active, shape if drafted else PLAIN, now - last)
        last = now
        if call.request.criteria and len(rows.active) < len(active):
            rows.end([row for row in active if row.ended])


def _move_together(call: Call, captured: CapturedRounds, active: Sequence[Row]) -> None:
    """Put the active rows into the first slots of the smallest `Rows` that can hold them."""
    fewer = captured.rows(call.request, len(active), call.rows.tokens.shape[1])
    if fewer is not call.rows or [row.slot for row in active] != list(range(len(active))):
        fewer.take_over(call.rows, active)
        call.rows = fewer


def take_all_pages(rows: Rows, room: int, session: DraftSession | None) -> None:
    """Take all pages that the active rows may need, since captured rounds cannot take more, and write block tables.

    room: tokens past a row's limit.
    session: of the drafter that takes part in the rounds (None: there is none).
    """
    active, cache = rows.active, rows.target.cache
    live = [row.sequence for row in active]
    cache.append(live, [max(0, row.limit + room - cache.length(row.sequence)) for row in active])
    rows.memory(rows.target).load(live, [row.length for row in active])
    for state in session.states if session else ():
        rows.memory(state.runner, state.draft_room).load(state.with_all_pages(active), [0] * len(active))


def _hand_back(call: Call) -> None:
    """Prepare the active rows for eager rounds: drop unused pages, and tokens that a draft model may not have seen."""
    active, cache = call.rows.active, call.rows.target.cache
    for row in active:
        cache.truncate(row.sequence, min(cache.length(row.sequence), row.length - 1))
    _forget_drafts(call)


def _forget_drafts(call: Call) -> None:
    """Drop the tokens at the end of the active rows that draft models may not have seen, or that were rejected."""
    active = call.rows.active
    for state in call.session.states if call.session else ():
        state.truncate(active, [max(0, row.length - call.policy.max_tokens - 1) for row in active])


def _plain_steps(call: Call, captured: CapturedRounds, room: int) -> tuple[Callable[[], None], int]:
    """Captured plain steps that change no row, several launched before the host reads, as with rounds."""
    plain = captured.of(None, None, call, PLAIN)
    take_all_pages(call.rows, room, None)
    rows, alive = call.rows, call.rows.alive.clone()

    def steps() -> None:
        rows.alive.zero_()
        for copy in [plain.launch() for _ in range(TIMED_STEPS)]:
            copy.read()
        rows.alive.copy_(alive)

    return steps, TIMED_STEPS
