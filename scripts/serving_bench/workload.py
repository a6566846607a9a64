"""Requests for `scripts.bench_serving`: from a trace file, from texts, or of random tokens; and when they arrive."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of token ids and how many new tokens are wanted.

    arrival: seconds after the beginning of the run (None: the run decides).
    """

    prompt: tuple[int, ...]
    new_tokens: int
    arrival: float | None = None

    def __post_init__(self):
        if not self.prompt or self.new_tokens < 1:
            raise ValueError(
                f"a request has a prompt and at least 1 new token, got {len(self.prompt)} and {self.new_tokens}"
            )
        if self.arrival is not None and not 0 <= self.arrival < math.inf:
            raise ValueError(f"arrival must be seconds from 0 on, got {self.arrival}")


def log_uniform(draws: random.Random, low: int, high: int) -> int:
    """A whole number from `low` to `high` whose logarithm is uniform, before rounding.

    >>> [log_uniform(random.Random(seed), 16, 256) for seed in range(4)]
    [166, 23, 227, 31]
    """
    if not 1 <= low <= high:
        raise ValueError(f"lengths must be at least 1, the smaller one first, got {low} and {high}")
    return round(math.exp(draws.uniform(math.log(low), math.log(high))))


def random_requests(count: int, prompt: tuple[int, int], output: tuple[int, int], vocab: int, seed: int,
                    prefix: int = 0) -> list[Request]:  # fmt: skip
    """Requests of random tokens; prompt and output lengths are log-uniform in these ranges, ends included.

    prefix: tokens before all prompts, the same ones for all."""
    draws = random.Random(seed)
    begin = tuple(draws.randrange(vocab) for _ in range(prefix))
    lengths = [(log_uniform(draws, *prompt), log_uniform(draws, *output)) for _ in range(count)]
    return [Request(begin + tuple(draws.randrange(vocab) for _ in range(n)), new) for n, new in lengths]


def text_requests(texts: Sequence[Sequence[int]], count: int, output: tuple[int, int], seed: int) -> list[Request]:
    """`count` requests for these prompts in turn, repeated if too few, with log-uniform output lengths."""
    draws = random.Random(seed)
    return [Request(tuple(text), log_uniform(draws, *output)) for text in islice(cycle(texts), count)]


def salted(requests: Sequence[Request], salt: int) -> list[Request]:
    """The requests of a pass of its own: a token before each prompt, so that no pass finds another one's prefixes."""
    return [replace(one, prompt=(salt, *one.prompt)) for one in requests]


def shortened(requests: Sequence[Request], count: int, most: int) -> list[Request]:
    """The first `count` requests, with new tokens scaled down to `most` at most, to warm up with."""
    longest = max(one.new_tokens for one in requests)
    scale = min(1.0, most / longest)
    return [replace(one, new_tokens=max(1, round(scale * one.new_tokens))) for one in requests[:count]]


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which `count` requests of a Poisson process of `rate` a second arrive, from the first one at 0."""
    if rate <= 0:
        raise ValueError(f"a rate is requests a second, above 0, got {rate}")
    draws = random.Random(seed)
    return list(accumulate((draws.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def read_trace(path: Path, tokenizer, vocab: int, seed: int) -> list[Request]:
    """Requests from JSON lines, in the order of their arrival.

    A line has "output_tokens", and either "prompt" (a text or a list of ids) or "prompt_tokens" (so many random ones);
    "arrival", in seconds, has every line or none. Raises ValueError naming the line for anything else."""
    draws, found = random.Random(seed), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_request_of(json.loads(line), tokenizer, vocab, draws))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no requests")
    if len({one.arrival is None for one in found}) > 1:
        raise ValueError(f"{path}: some requests have an arrival and others have none")
    return sorted(found, key=lambda one: one.arrival or 0.0)


def _request_of(entry, tokenizer, vocab: int, draws: random.Random) -> Request:
    names = {"arrival", "prompt", "prompt_tokens", "output_tokens"}
    if not isinstance(entry, dict) or set(entry) - names:
        raise ValueError(f"a request is an object with some of {', '.join(sorted(names))}, got {entry!r}")
    if ("prompt" in entry) == ("prompt_tokens" in entry):
        raise ValueError('either "prompt" or "prompt_tokens" is wanted')
    if "output_tokens" not in entry:
        raise ValueError('"output_tokens" is missing')
    arrival = entry.get("arrival")
    if arrival is not None and (isinstance(arrival, bool) or not isinstance(arrival, int | float)):
        raise ValueError(f'"arrival" must be seconds, got {arrival!r}')
    return Request(_prompt_of(entry, tokenizer, vocab, draws), _count(entry, "output_tokens"), arrival)


def _prompt_of(entry: dict, tokenizer, vocab: int, draws: random.Random) -> tuple[int, ...]:
    if "prompt_tokens" in entry:
        return tuple(draws.randrange(vocab) for _ in range(_count(entry, "prompt_tokens")))
    prompt = entry["prompt"]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("a prompt as text needs a model with a tokenizer: give ids, or prompt_tokens")
        return tuple(tokenizer(prompt).input_ids)
    ids = [token for token in prompt if isinstance(token, int) and 0 <= token < vocab]
    if len(ids) < len(prompt):
        raise ValueError(f"a prompt is a text or ids from 0 to {vocab - 1}")
    return tuple(ids)


def _count(entry: dict, name: str) -> int:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'"{name}" must be a whole number from 1 on, got {value!r}')
    return value
