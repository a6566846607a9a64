"""Timed calls of a method, and the speeds that every method has."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 2  # calls that do not count


class NotAvailable(RuntimeError):
    """A method cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Timed:
    """The result of the call of median time, the seconds of all that count, and of the first, which compiles."""

    result: object
    seconds: list[float]
    first_call_seconds: float


def timed(call: Callable[[], object], options, repeats: int | None = None) -> Timed:
    """Call it `WARM_UP` times, then `repeats` times (None: `options.repeats`).

    At least two calls count; no more are begun once they took `options.row_seconds`."""
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    runs, early, repeats = [], [], repeats or options.repeats
    while len(runs) < repeats and (len(runs) < 2 or sum(seconds for seconds, _ in runs) < options.row_seconds):
        wait()
        began = time.perf_counter()
        result = call()
        wait()
        (early if len(early) < WARM_UP else runs).append((time.perf_counter() - began, result))
    middle = sorted(runs, key=lambda run: run[0])[(len(runs) - 1) // 2]
    return Timed(middle[1], [seconds for seconds, _ in runs], early[0][0])


def speeds(call: Callable[[int], object], batch: int, options) -> tuple[dict, Timed]:
    """Speeds of whole calls of `call(number of new tokens)`, prompt included, and the timed calls themselves."""
    whole = timed(lambda: call(options.new_tokens), options)
    peak = torch.cuda.max_memory_reserved() if options.device == "cuda" else None
    first = timed(lambda: call(1), options)
    tokens, median = batch * options.new_tokens, statistics.median(whole.seconds)
    return {
        "tokens_per_second": tokens / median,
        "range": [tokens / max(whole.seconds), tokens / min(whole.seconds)],
        "seconds": whole.seconds,
        "first_token_seconds": statistics.median(first.seconds),
        "first_call_seconds": whole.first_call_seconds,
        "peak_bytes": peak,
    }, whole
