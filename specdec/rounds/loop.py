"""The decoding loop for any drafter and any acceptance rule.

Plain autoregressive decoding is the same loop with empty drafts, so that both share their code."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.acceptance import AcceptanceRule
from specdec.acceptance.base import is_lossless
from specdec.drafters import Drafter
from specdec.drafters.base import prompt_reader, require_session
from specdec.drafters.model_state import see_images
from specdec.drafters.suffix_memory import memories_of
from specdec.model.image_prompts import run_image_prompts
from specdec.model.prefill import prefill_long_prompts
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, Policy
from specdec.planning.step_clock import StepClock
from specdec.report.stats import GenerationStats
from specdec.requests.request import Request
from specdec.requests.rows import Row, Rows
from specdec.rounds.captured import CapturedRounds
from specdec.rounds.launched import run_captured
from specdec.rounds.records import Call, Record, release
from specdec.rounds.round import plain_step, run_eagerly


@dataclass(frozen=True, slots=True)
class Decoded:
    """`rows[i]`: the new tokens of row i; `outputs[name][i] [n, V]`: what they were chosen from, if it is wanted."""

    rows: list[list[int]]
    stats: GenerationStats
    outputs: dict[str, list[Tensor]]


@torch.inference_mode()
def decode(target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule, request: Request, policy: Policy,
           captured: CapturedRounds, emit: Callable[[Sequence[Row]], None] | None = None,
           clock: StepClock | None = None) -> Decoded:  # fmt: skip
    """Run `request` to its end; without a drafter a round is a plain step.

    policy: what each round proposes.
    captured: runs the rounds after the first on the device, if nothing in the call prevents it.
    emit: called after each round with its rows, whose `new_tokens` are those of the round.
    clock: times a plain step (None: rounds without a draft are timed instead).

    All pages taken here are freed, whatever happens. Raises ValueError for processors with a memory together with a
    drafter."""
    if drafter is not None and request.processors.memory:
        names = ", ".join(request.processors.memory)
        raise ValueError(
            f"{names} remembers the calls before, also those for rejected tokens, so drafts would change the text: use "
            "AutoregressiveGenerator or transformers' own generate"
        )
    room = 1 + max(policy.max_tokens, drafter.traits.target_tokens if drafter is not None else 0)
    target.require_rollback(room)
    target.reserve([limit + room for limit in request.limits])
    began, spent = time.perf_counter(), 0.0 if clock is None else clock.spent
    target.refresh()
    reason = captured.fallback_reason(drafter, rule, request, policy)
    if reason is None:
        rows = captured.rows(request, target.slots_for(len(request.prompts)), max(request.limits) + room)
        rows.begin(request)
    else:
        rows = Rows.of(target, request, room)
    records = {row: Record() for row in rows.members}
    call = Call(rows, request, rule, policy, records, emit, fallback_reason=reason, memories=(*memories_of(drafter),))
    remembered = sum(memory.stats.answers for memory in call.memories)
    for row in rows.members:
        row.sequence = target.cache.add()
    try:
        if drafter is not None:
            rows.feature_room = drafter.traits.feature_room
            session = drafter.start(rows, policy.max_tokens)
            require_session(session, drafter)
            call.session, call.features = session, drafter.traits.features
        for runner in call.runners:  # a few eager rounds before captured ones are not worth compiling
            runner.compiles_forwards = reason is not None
        prompts = [rows.tokens[row.slot, : row.length] for row in rows.members]
        _prefill(call, prompts)
        run_eagerly(call, timed=False)  # includes the prefill, so its time is not a round's
        first_ended = time.perf_counter()
        step = _run_rest(call, drafter, captured, room, clock)
        ended = time.perf_counter()
    finally:
        for runner in call.runners:
            runner.compiles_forwards = True
        release(call, call.rows.members)
    policy.finish([len(one.emitted) for one in records.values()], [len(one.new_tokens) for one in records.values()])
    timing = 0.0 if clock is None else clock.spent - spent
    return _decoded(call, step, first_ended - began, ended - first_ended - call.excluded, remembered, timing)


def _prefill(call: Call, prompts: Sequence[Tensor]) -> None:
    """Run long prompts but for their last chunk, and those with images but for their last token.

    What reads features of all tokens gets those of each chunk."""
    rows, give = call.rows, prompt_reader(call.session, call.rows)
    features = None if give is None else call.features
    sequences, images = [row.sequence for row in rows.members], call.request.images
    if images is None:
        prefill_long_prompts(rows.target, sequences, prompts, features, give)
    else:
        run_image_prompts(rows.target, sequences, images, features, give)
        see_images(call.session, rows, images)


def _run_rest(call: Call, drafter: Drafter | None, captured: CapturedRounds, room: int,
              clock: StepClock | None) -> float | None:  # fmt: skip
    """Run all rounds after the first -> the seconds of a plain step, if `clock` timed one."""
    step, active, started = None, call.rows.active, time.perf_counter()
    if active and call.fallback_reason is None:
        step = run_captured(call, drafter, captured, room, clock)
    elif active and clock is not None:
        lengths = [row.length for row in active]
        step = clock.measure("host", call.rows.target.mode, lengths, lambda: (plain_step(call.rows), 1))
        call.excluded += time.perf_counter() - started
    while call.rows.active:
        run_eagerly(call)
    return step


def _decoded(call: Call, step: float | None, prefill_seconds: float, decode_seconds: float,
             remembered: int, timing: float) -> Decoded:  # fmt: skip
    """The new tokens and the statistics of `call`, in which a plain step took `step` seconds (None: not timed)."""
    records = list(call.records.values())
    if step is None:  # rounds without a draft are steps
        timed = [pair for record in records for pair in zip(record.seconds, record.shapes[1:], strict=False)]
        seconds = [seconds for seconds, shape in timed if shape == PLAIN]
        step = sum(seconds) / len(seconds) if seconds else call.policy.step_seconds
    rows, new_tokens = tuple(record.stats(step) for record in records), [record.new_tokens for record in records]
    count, lossless = sum(map(len, new_tokens)), is_lossless(call.rule)
    stats = GenerationStats(
        rows, prefill_seconds, decode_seconds, count, lossless, call.fallback_reason, remembered, timing
    )
    outputs = {name: [torch.cat(record.outputs[name]) for record in records] for name in call.request.outputs}
    return Decoded(new_tokens, stats, outputs)
