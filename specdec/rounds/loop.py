"""The decoding loop: propose -> verify -> accept -> commit, for any drafter and any acceptance rule.

Plain autoregressive decoding is the same loop with a draft of no tokens, so both share every line that could differ by mistake.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attention import OutOfPages
from specdec.acceptance import AcceptanceRule
from specdec.cuda_graph import CannotRecord
from specdec.drafters import Drafter
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, Policy
from specdec.report.stats import GenerationStats
from specdec.requests.request import Request
from specdec.requests.rows import DraftContext
from specdec.rounds.captured import Recordings
from specdec.rounds.records import _Call, _end_round, _hear, _release, _Row
from specdec.rounds.round import DeviceRounds, _host_round, _plain_step, _prefill_long_prompts

AHEAD = 2  # rounds on their way on the device before the host reads the first of them
StepSeconds = Callable[[tuple, Callable[[], tuple[Callable[[], None], int]]], float]
STEPS = 4  # plain steps that are timed in a row on the device


@dataclass(frozen=True, slots=True)
class Decoded:
    """`rows[i]`: the new tokens of row i; `stats` of the call."""

    rows: list[list[int]]
    stats: GenerationStats


@torch.inference_mode()
def decode(target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule, request: Request, policy: Policy,
           emit: Callable[[list[list[int]]], None] | None = None, step_seconds: StepSeconds | None = None,
           recordings: Recordings | None = None) -> Decoded:  # fmt: skip
    """Run `request` to its end.

    `policy` says what each round proposes. `emit` hears, per round, the new tokens of every row. `step_seconds(size, prepare)` may time plain
    steps; `size` says where they run, how many rows live and the binary magnitude of the longest, and `prepare()` gives a function and how
    many steps it takes. Without a drafter a round is a step. With `recordings` the rounds behind the first run on the device, where nothing
    in the call speaks against it.

    Whatever happens, all pages taken here are given back. Raises ValueError for processors with a memory together with a drafter.
    """
    if drafter is not None and request.processors.memory:
        raise ValueError(f"{', '.join(request.processors.memory)} remembers the calls before, so with a draft, where refused tokens are tried too, it would "
                         "write another text: use AutoregressiveGenerator or transformers' own generate")  # fmt: skip
    call = _Call(DraftContext.of(target, request), request, rule, policy, [_Row() for _ in request.prompts], emit)
    context, records = call.context, call.records
    room = 1 + max(policy.max_tokens, getattr(drafter, "target_tokens", 0))
    target.reserve([limit + room for limit in request.limits])
    context.sequences.update({row: target.cache.add() for row in range(len(records))})
    step = None
    try:
        began = time.perf_counter()
        target.refresh()
        call.session = drafter.start(context, policy.max_tokens) if drafter is not None else None
        call.obstacle = 'the target runs with mode="eager"' if recordings is None else recordings.obstacle(call.session, request, policy)
        for runner in call.runners:  # what the host does once before the device goes on is not worth compiling
            runner.compiles_forwards = call.obstacle is not None
        _prefill_long_prompts(context, context.sequences)
        _host_round(call, timed=False)  # the first holds the prefill, so it is no measure of a round
        first_ended = time.perf_counter()
        if call.obstacle is None and call.active:
            step = _device_rounds(call, drafter, recordings, room, step_seconds)
        elif call.active and step_seconds is not None:
            size = "host", target.mode, len(call.active), max(context.lengths).bit_length()
            step = step_seconds(size, lambda: (lambda: _plain_step(context), 1))
            call.excluded += time.perf_counter() - first_ended
        while call.active:
            _host_round(call)
        ended = time.perf_counter()
    finally:
        for runner in call.runners:
            runner.compiles_forwards = True
        _release(call, list(context.sequences))
    if step is None:  # rounds without a draft are steps
        seconds = [s for record in records for s, shape in zip(record.seconds, record.shapes[1:], strict=False) if shape == PLAIN.name]
        step = sum(seconds) / len(seconds) if seconds else policy.step_seconds
    stats = GenerationStats(tuple(record.stats(step) for record in records), first_ended - began, ended - first_ended - call.excluded,
                            sum(len(record.new_tokens) for record in records), getattr(rule, "lossless", True), call.obstacle)  # fmt: skip
    return Decoded([record.new_tokens for record in records], stats)


def _device_rounds(call: _Call, drafter: Drafter | None, recordings: Recordings, room: int, step_seconds) -> float | None:
    """All rounds that are left, on the device and one ahead of the host -> the time of a plain step, where `step_seconds` took it.

    Leaves rows for the host where something cannot be recorded or not all pages can be taken.
    """
    context, step, capacity = call.context, None, max(call.context.limits) + room
    find = lambda session, shape, rows: recordings.of(drafter, session, call.rule, call.request, context, shape, len(rows), capacity)  # noqa: E731
    while active := call.active:
        shape = PLAIN if call.session is None else call.policy.next()
        started = time.perf_counter()
        try:
            rounds = find(call.session, shape, active)
            ready = min(context.lengths[row] for row in active) >= rounds.min_length
            if ready and step_seconds is not None and step is None:
                size = "device", context.target.mode, len(active), max(context.lengths).bit_length()
                step = step_seconds(size, lambda rows=active: _plain_steps(context, find(None, PLAIN, rows), rows, room))
            if ready:
                _take_pages(context, active, room)
        except (CannotRecord, OutOfPages) as error:
            if isinstance(error, CannotRecord):
                context.target.complain(error)
            call.obstacle = f"not all pages could be taken beforehand: {error}" if isinstance(error, OutOfPages) else str(error)
            _hand_back(call, active)
            return step
        finally:
            call.excluded += time.perf_counter() - started
        if not ready:
            _host_round(call)
            continue
        heard = time.perf_counter()
        rounds.load(context, call.session, active)
        ahead = AHEAD
        if call.request.criteria:
            call.obstacle, ahead = "a stopping criterion is asked after every round, in Python", 1
        pending = deque()
        while (rows := call.active) and (pending or 2 * len(rows) > rounds.num_rows):  # with half of the rows gone, fewer do
            # those on their way may already bring every row to its limit
            while len(pending) < ahead and 2 * len(rows) > rounds.num_rows and any(context.lengths[r] + len(pending) < context.limits[r] for r in rows):
                pending.append(rounds.launch())
            answer = pending.popleft().read()
            _hear(call, rows, rounds.layout, [answer[rounds.rows[row]] for row in rows], write=bool(call.request.criteria))
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
    cache.append(live, [max(0, context.limits[row] + room - cache.length(s)) for row, s in zip(rows, live, strict=True)])


def _hand_back(call: _Call, rows: Sequence[int]) -> None:
    """Leave `rows` to the host: without the pages that were taken beforehand, and without what a draft model's cache may hold of other tokens."""
    context, state = call.context, getattr(call.session, "state", None)
    for row in rows:
        sequence = context.sequences[row]
        context.target.cache.truncate(sequence, min(context.target.cache.length(sequence), context.lengths[row] - 1))
    if state is not None:
        state.keep(rows, [max(0, context.lengths[row] - call.policy.max_tokens - 1) for row in rows])


def _plain_steps(context: DraftContext, plain: DeviceRounds, rows: Sequence[int], room: int) -> tuple[Callable[[], None], int]:
    """Plain steps on the device, of which nothing is kept, launched as rounds are: several before the host reads."""
    _take_pages(context, rows, room)
    plain.load(context, None, rows)
    plain.stop(rows)

    def steps() -> None:
        for reply in [plain.launch() for _ in range(STEPS)]:
            reply.read()

    return steps, STEPS
