"""The decoding loop: propose -> verify -> accept -> commit, for any drafter and any acceptance rule.

Plain autoregressive decoding is the same loop with a draft of no tokens, so both share every line that could differ by
mistake."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from specdec.acceptance import AcceptanceRule
from specdec.drafters import Drafter
from specdec.model.prefill import prefill_long_prompts
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, Policy
from specdec.report.stats import GenerationStats
from specdec.requests.request import Request
from specdec.requests.rows import DraftContext
from specdec.rounds.captured import CapturedRounds, _device_rounds
from specdec.rounds.records import _Call, _release, _Row
from specdec.rounds.round import _host_round, _plain_step

StepSeconds = Callable[[tuple, Callable[[], tuple[Callable[[], None], int]]], float]


@dataclass(frozen=True, slots=True)
class Decoded:
    """`rows[i]`: the new tokens of row i; `stats` of the call."""

    rows: list[list[int]]
    stats: GenerationStats


@torch.inference_mode()
def decode(target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule, request: Request, policy: Policy,
           emit: Callable[[list[list[int]]], None] | None = None, step_seconds: StepSeconds | None = None,
           recordings: CapturedRounds | None = None) -> Decoded:  # fmt: skip
    """Run `request` to its end.

    `policy` says what each round proposes. `emit` hears, per round, the new tokens of every row. `step_seconds(size,
    prepare)` may time plain steps; `size` says where they run, how many rows live and the binary magnitude of the
    longest, and `prepare()` gives a function and how many steps it takes. Without a drafter a round is a step. With
    `recordings` the rounds behind the first run on the device, where nothing in the call speaks against it.

    Whatever happens, all pages taken here are given back. Raises ValueError for processors with a memory together with
    a drafter."""
    if drafter is not None and request.processors.memory:
        raise ValueError(
            f"{', '.join(request.processors.memory)} remembers the calls before, so with a draft, where "
            "refused tokens are tried too, it would "
            "write another text: use AutoregressiveGenerator or transformers' own generate"
        )
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
        call.fallback_reason = (
            'the target runs with mode="eager"'
            if recordings is None
            else recordings.fallback_reason(call.session, request, policy)
        )
        for runner in call.runners:  # what the host does once before the device goes on is not worth compiling
            runner.compiles_forwards = call.fallback_reason is not None
        prompts = [context.tokens[row, :length] for row, length in enumerate(context.lengths)]
        prefill_long_prompts(target, list(context.sequences.values()), prompts)
        _host_round(call, timed=False)  # the first holds the prefill, so it is no measure of a round
        first_ended = time.perf_counter()
        if call.fallback_reason is None and call.active:
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
        seconds = [
            s
            for record in records
            for s, shape in zip(record.seconds, record.shapes[1:], strict=False)
            if shape == PLAIN.name
        ]
        step = sum(seconds) / len(seconds) if seconds else policy.step_seconds
    stats = GenerationStats(
        tuple(record.stats(step) for record in records),
        first_ended - began,
        ended - first_ended - call.excluded,
        sum(len(record.new_tokens) for record in records),
        getattr(rule, "lossless", True),
        call.fallback_reason,
    )
    return Decoded([record.new_tokens for record in records], stats)
