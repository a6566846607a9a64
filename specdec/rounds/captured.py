"""Rounds that run without the host: draft, verify, accept and commit as one function of tensors, which a CUDA graph
replays.

The host launches a round before it has read what the one before gave; what a round did is read one round late, from one
small tensor. Rows end on the device at their limit and at end-of-text tokens. A row that the host ends (a stopping
criterion) is told so, and what it drafted meanwhile is forgotten."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from attention import OutOfPages
from specdec.acceptance import AcceptanceRule
from specdec.cuda_graph import ByIdentity, CannotCapture, GraphCache
from specdec.drafters import Drafter, DraftSession
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, FixedPolicy, Policy, Shape
from specdec.requests.request import Request
from specdec.requests.rows import DraftContext
from specdec.rounds.records import _Call, _end_round, _hear
from specdec.rounds.round import DeviceRounds, _host_round

# tokens of a row that a recording has room for, then the next powers of two: texts of similar length share one

MIN_CAPACITY = 512


class CapturedRounds:
    """The rounds that a generator has recorded, and whether a call can be run with them."""

    KEPT = 32

    def __init__(self, target: ModelRunner):
        self._target, self._shelf = target, GraphCache(self.KEPT)

    def drop_graphs(self) -> None:
        """Drop them all: called by the runners whose models they run."""
        self._shelf.clear()

    def fallback_reason(self, session: DraftSession | None, request: Request, policy: Policy) -> str | None:
        """Why the host must take part in every round of this call; None: it need not."""
        if self._target.mode == "eager":
            return 'the target runs with mode="eager"'
        if not isinstance(policy, FixedPolicy):
            return "the shape of each round is chosen from what the rounds before gave"
        if session is not None and not getattr(session, "runs_on_device", False):
            return f"a {type(session).__name__} asks the host in every round"
        if request.processors.ask_host:
            return f"logits processors look at the text or ask the device: {', '.join(request.processors.ask_host)}"
        return None

    def of(
        self,
        drafter: Drafter | None,
        session: DraftSession | None,
        rule: AcceptanceRule,
        request: Request,
        context: DraftContext,
        shape: Shape,
        count: int,
        capacity: int,
    ) -> DeviceRounds:
        """Rounds for `count` rows of up to `capacity` tokens, drafts included, or somewhat more of both. Raises
        CannotRecord.
        """
        num_rows, capacity = 1 << (count - 1).bit_length(), max(MIN_CAPACITY, 1 << (capacity - 1).bit_length())
        plain = session is None or shape == PLAIN
        own = None if plain else (ByIdentity(drafter), getattr(session, "reads", ()))
        key = (
            own,
            shape,
            num_rows,
            capacity,
            ByIdentity(rule),
            request.do_sample,
            request.eos,
            request.processors.signature,
        )
        return self._shelf.get(key, lambda: self._make(session, rule, request, context, shape, num_rows, capacity))

    def _make(self, *arguments) -> DeviceRounds:
        rounds = DeviceRounds(self._target, *arguments)
        for runner in rounds.runners:
            runner.graph_holders.add(self)
        return rounds


ROUNDS_IN_FLIGHT = 2  # rounds on their way on the device before the host reads the first of them


TIMED_STEPS = 4  # plain steps that are timed in a row on the device


def _device_rounds(
    call: _Call, drafter: Drafter | None, recordings: CapturedRounds, room: int, step_seconds
) -> float | None:
    """All rounds that are left, on the device and one ahead of the host -> the time of a plain step, where
    `step_seconds` took it.

    Leaves rows for the host where something cannot be recorded or not all pages can be taken.
    """
    context, step, capacity = call.context, None, max(call.context.limits) + room
    find = lambda session, shape, rows: recordings.of(
        drafter, session, call.rule, call.request, context, shape, len(rows), capacity
    )
    while active := call.active:
        shape = PLAIN if call.session is None else call.policy.next()
        started = time.perf_counter()
        try:
            rounds = find(call.session, shape, active)
            ready = min(context.lengths[row] for row in active) >= rounds.min_length
            if ready and step_seconds is not None and step is None:
                size = "device", context.target.mode, len(active), max(context.lengths).bit_length()
                step = step_seconds(
                    size, lambda rows=active: _plain_steps(context, find(None, PLAIN, rows), rows, room)
                )
            if ready:
                _take_pages(context, active, room)
        except (CannotCapture, OutOfPages) as error:
            if isinstance(error, CannotCapture):
                context.target.fall_back(error)
            call.fallback_reason = (
                f"not all pages could be taken beforehand: {error}" if isinstance(error, OutOfPages) else str(error)
            )
            _hand_back(call, active)
            return step
        finally:
            call.excluded += time.perf_counter() - started
        if not ready:
            _host_round(call)
            continue
        heard = time.perf_counter()
        rounds.load(context, call.session, active)
        ahead = ROUNDS_IN_FLIGHT
        if call.request.criteria:
            call.fallback_reason, ahead = "a stopping criterion is asked after every round, in Python", 1
        pending = deque()
        while (rows := call.active) and (
            pending or 2 * len(rows) > rounds.num_rows
        ):  # with half of the rows gone, fewer do
            # those on their way may already bring every row to its limit
            while (
                len(pending) < ahead
                and 2 * len(rows) > rounds.num_rows
                and any(context.lengths[r] + len(pending) < context.limits[r] for r in rows)
            ):
                pending.append(rounds.launch())
            answer = pending.popleft().read()
            _hear(
                call, rows, rounds.layout, [answer[rounds.rows[row]] for row in rows], write=bool(call.request.criteria)
            )
            now = time.perf_counter()
            _end_round(call, rows, shape, now - heard)
            heard = now
            if call.request.criteria and call.active != rows:
                rounds.stop([row for row in rows if call.records[row].ended])
        if call.active:
            rounds.unload(context)
    return step


def _take_pages(context: DraftContext, rows: Sequence[int], room: int) -> None:
    """Give each row all the pages that it may ever need, since rounds on the device cannot ask for more."""
    cache, live = context.target.cache, [context.sequences[row] for row in rows]
    cache.append(
        live, [max(0, context.limits[row] + room - cache.length(s)) for row, s in zip(rows, live, strict=True)]
    )


def _hand_back(call: _Call, rows: Sequence[int]) -> None:
    """Leave `rows` to the host: without the pages that were taken beforehand, and without what a draft model's cache
    may hold of other tokens.
    """
    context, state = call.context, getattr(call.session, "state", None)
    for row in rows:
        sequence = context.sequences[row]
        context.target.cache.truncate(sequence, min(context.target.cache.length(sequence), context.lengths[row] - 1))
    if state is not None:
        state.keep(rows, [max(0, context.lengths[row] - call.policy.max_tokens - 1) for row in rows])


def _plain_steps(
    context: DraftContext, plain: DeviceRounds, rows: Sequence[int], room: int
) -> tuple[Callable[[], None], int]:
    """Plain steps on the device, of which nothing is kept, launched as rounds are: several before the host reads."""
    _take_pages(context, rows, room)
    plain.load(context, None, rows)
    plain.stop(rows)

    def steps() -> None:
        for reply in [plain.launch() for _ in range(TIMED_STEPS)]:
            reply.read()

    return steps, TIMED_STEPS
