"""Methods that decode a batch of prompts, each from a cold start: transformers' own, our generators and engines."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafters import Drafter, ModelDrafter, PromptLookupDrafter
from specdec.engine import Engine
from specdec.evaluation.sampling import used_by_ours, used_by_theirs
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator
from specdec.report.stats import RoundStats
from specdec.requests.options import end_tokens

PLAIN, OURS = "transformers generate", "specdec autoregressive"


@dataclass(frozen=True, slots=True)
class Decoded:
    """The new tokens of a call, of each row up to its end.

    rounds: of each row (None: transformers' methods tell nothing).
    reused: what outlived an earlier call and was of use: tokens of prompts that were not computed, answers in a memory.
    untimed: seconds of the call that went into timing, not decoding.
    """

    rows: tuple[tuple[int, ...], ...]
    rounds: tuple[RoundStats, ...] | None = None
    reused: int = 0
    untimed: float = 0.0


@dataclass(frozen=True, slots=True)
class Method:
    """A way to decode.

    decode: `decode(ids [B, S], mask [B, S], count, seed, sampling)`, the call that is timed.
    used: what it samples with, given the arguments of `settings_for`, see `specdec.evaluation.sampling`.
    reset: makes the next call start cold; called before each one, and not timed.
    most_rows: it decodes at the same time (None: any number).
    """

    decode: Callable[[Tensor, Tensor, int, int, dict], Decoded]
    used: Callable[[dict], dict]
    reset: Callable[[], None] = lambda: None
    most_rows: int | None = None


def theirs(model, **more: Any) -> Method:
    """transformers' own `generate`, with `more` arguments (such as an assistant model).

    Its assisted decoding writes the draft length that it found into the assistant's generation config; that is put back
    before each call."""
    assistant = more.get("assistant_model")
    kept = None if assistant is None else copy.deepcopy(assistant.generation_config)

    def decode(ids: Tensor, mask: Tensor, count: int, seed: int, sampling: dict) -> Decoded:
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, **sampling, **more)
        ends = end_tokens(model._prepare_generation_config(None)[0])
        return Decoded(tuple(_cut(row, ends) for row in out[:, ids.shape[1] :].tolist()))

    def reset() -> None:
        if assistant is not None:
            assistant.generation_config = copy.deepcopy(kept)

    return Method(decode, lambda settings: used_by_theirs(model, settings), reset, 1 if more else None)


def ours(generator: SpeculativeGenerator | AutoregressiveGenerator, warm: bool = False) -> Method:
    """A generator of this library. `warm`: what calls have taught stays for the next one."""

    def decode(ids: Tensor, mask: Tensor, count: int, seed: int, sampling: dict) -> Decoded:
        out = generator.generate(ids, mask, max_new_tokens=count, seed=seed, **sampling)
        new = out.sequences[:, ids.shape[1] :].tolist()
        rows = tuple(tuple(row[:length]) for row, length in zip(new, out.lengths.tolist(), strict=True))
        return Decoded(rows, out.stats.rows, out.stats.remembered, out.stats.timing_seconds)

    model = generator.target.model
    return Method(decode, lambda settings: used_by_ours(model, settings), _reset_of(generator, warm))


def ours_in_engine(engine: Engine, warm: bool = False) -> Method:
    """An engine of this library, which shares prefixes; rows are requests that arrive together."""

    def decode(ids: Tensor, mask: Tensor, count: int, seed: int, sampling: dict) -> Decoded:
        before = engine.stats()["saved_tokens"]
        handles = [
            engine.submit(row[real.bool()], max_new_tokens=count, seed=seed + number, **sampling)
            for number, (row, real) in enumerate(zip(ids, mask, strict=True))
        ]
        for handle in engine.run():
            if handle.error is not None:
                raise handle.error
        rows = tuple(tuple(handle.tokens) for handle in handles)
        saved = engine.stats()["saved_tokens"] - before
        return Decoded(rows, tuple(handle.stats for handle in handles), saved)

    model = engine.target.model
    return Method(decode, lambda settings: used_by_ours(model, settings), _reset_of(engine, warm))


def peer_of(drafter: Drafter) -> dict[str, Any] | None:
    """Arguments with which transformers' generate drafts the same way, with its own schedule; None: it cannot."""
    if isinstance(drafter, ModelDrafter):
        return {"assistant_model": drafter.runner.model}
    if isinstance(drafter, PromptLookupDrafter):
        return {"prompt_lookup_num_tokens": drafter.length, "max_matching_ngram_size": drafter.max_ngram}
    return None


def timed(method: Method, ids: Tensor, mask: Tensor, count: int, seed: int, sampling: dict) -> tuple[Decoded, float]:
    """One call of a method, from its cold start -> what it decoded, and its seconds."""
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    method.reset()
    wait()
    began = time.perf_counter()
    decoded = method.decode(ids, mask, count, seed, sampling)
    wait()
    return decoded, time.perf_counter() - began - decoded.untimed


def _reset_of(caller: SpeculativeGenerator | AutoregressiveGenerator | Engine, warm: bool) -> Callable[[], None]:
    if warm or isinstance(caller, AutoregressiveGenerator):  # which remembers nothing
        return lambda: None
    return caller.forget_texts


def _cut(row: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """A row without what was padded after its end."""
    for place, token in enumerate(row):
        if token in ends:
            return tuple(row[: place + 1])
    return tuple(row)
