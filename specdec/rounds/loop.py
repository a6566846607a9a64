"""The decoding loop: propose -> verify -> accept -> commit, for any drafter and any acceptance rule.

Plain autoregressive decoding is the same loop with a draft of no tokens, so both share every line that could differ by
mistake."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from specdec.acceptance import AcceptanceRule
from specdec.acceptance.base import is_lossless
from specdec.drafters import Drafter
from specdec.model.prefill import prefill_long_prompts
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, Policy
from specdec.report.stats import GenerationStats
from specdec.requests.request import Request
from specdec.requests.rows import Rows
from specdec.rounds.captured import CapturedRounds, run_captured
from specdec.rounds.records import Call, Record, release
from specdec.rounds.round import plain_step, run_eagerly

StepSeconds = Callable[[tuple, Callable[[], tuple[Callable[[], None], int]]], float]


@dataclass(frozen=True, slots=True)
class Decoded:
    """`rows[i]`: the new tokens of row i; `stats` of the call."""

    rows: list[list[int]]
    stats: GenerationStats


@torch.inference_mode()
def decode(target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule, request: Request, policy: Policy,
           emit: Callable[[list[list[int]]], None] | None = None, step_seconds: StepSeconds | None = None,
           captured: CapturedRounds | None = None) -> Decoded:  # fmt: skip
    """Run `request` to its end.

    `policy` says what each round proposes. `emit` hears, per round, the new tokens of every row. `step_seconds(size,
    prepare)` may time plain steps; `size` says where they run, how many rows live and the binary magnitude of the
    longest, and `prepare()` gives a function and how many steps it takes. Without a drafter a round is a step. With
    `captured` the rounds behind the first run on the device, where nothing in the call speaks against it.

    Whatever happens, all pages taken here are given back. Raises ValueError for processors with a memory together with
    a drafter."""
    if drafter is not None and request.processors.memory:
        raise ValueError(
            f"{', '.join(request.processors.memory)} remembers the calls before, so with a draft, where "
            "refused tokens are tried too, it would "
            "write another text: use AutoregressiveGenerator or transformers' own generate"
        )
    room = 1 + max(policy.max_tokens, drafter.traits.target_tokens if drafter is not None else 0)
    target.reserve([limit + room for limit in request.limits])
    began = time.perf_counter()
    target.refresh()
    reason = 'the target runs with mode="eager"'
    if captured is not None:
        reason = captured.fallback_reason(drafter, request, policy)
    if captured is not None and reason is None:
        rows = captured.rows(request, len(request.prompts), max(request.limits) + room)
        rows.begin(request)
    else:
        rows = Rows.of(target, request, room)
    call = Call(rows, request, rule, policy, [Record() for _ in request.prompts], emit, fallback_reason=reason)
    for row in rows.members:
        row.sequence = target.cache.add()
    step = None
    try:
        if drafter is not None:
            call.session, call.features = drafter.start(rows, policy.max_tokens), drafter.traits.features
        for runner in call.runners:  # eager rounds before captured ones are not worth compiling
            runner.compiles_forwards = reason is not None
        prefill_long_prompts(target, [row.sequence for row in rows.members], request.prompts)
        run_eagerly(call, timed=False)  # the first holds the prefill, so it is no measure of a round
        first_ended = time.perf_counter()
        active = call.rows.active
        if captured is not None and reason is None and active:
            step = run_captured(call, drafter, captured, room, step_seconds)
        elif active and step_seconds is not None:
            size = "host", target.mode, len(active), max(row.length for row in active).bit_length()
            step = step_seconds(size, lambda: (plain_step(rows), 1))
            call.excluded += time.perf_counter() - first_ended
        while call.rows.active:
            run_eagerly(call)
        ended = time.perf_counter()
    finally:
        for runner in call.runners:
            runner.compiles_forwards = True
        release(call, call.rows.members)
    if step is None:  # rounds without a draft are steps
        timed = [pair for record in call.records for pair in zip(record.seconds, record.shapes[1:], strict=False)]
        seconds = [seconds for seconds, shape in timed if shape == PLAIN.name]
        step = sum(seconds) / len(seconds) if seconds else policy.step_seconds
    stats = GenerationStats(
        tuple(record.stats(step) for record in call.records),
        first_ended - began,
        ended - first_ended - call.excluded,
        sum(len(record.new_tokens) for record in call.records),
        is_lossless(rule),
        call.fallback_reason,
    )
    return Decoded([record.new_tokens for record in call.records], stats)
