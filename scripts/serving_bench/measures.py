"""What one run of requests gave: times of their tokens, and the figures that serving papers print of them.

Papers and tools use the same names for different figures. Here:

* time to first token: from a request's arrival, as it was scheduled, to its first token. It holds the wait in the
  queue, and that for a step under way (vLLM's benchmark counts from when its client sends).
* token gap ("gap"): the time between two deliveries of a request, whatever they bring. That is what vLLM's benchmark
  calls inter-token latency. A round that brings several tokens counts once, so drafts make this figure larger.
* inter-token latency ("itl"): each gap spread over the tokens that end it: k tokens after a gap of g seconds count as
  k times g / k. Tokens of the first delivery have no gap. Without drafts it is the gap.
* time per output token ("tpot"): of one request, (last token - first token) / (tokens - 1), as in DistServe (Zhong et
  al. 2024) and vLLM; None for a single token and for methods that hand over whole texts.
* latency: from the scheduled arrival to the last token.
* goodput: requests a second, of those that finished, whose time to first token and whose time per output token both
  stay within their limits (DistServe's definition; vLLM's for these two).
* throughput: useful tokens, those that were asked for, over the time from the first arrival to the last token.

Percentiles interpolate linearly between the two nearest values. All times are in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class RequestRecord:
    """One request of a run.

    number: its place in the workload.
    wanted: new tokens that were asked for.
    arrival: seconds after the run began, as scheduled.
    events: when tokens were delivered, in seconds after the run began, and how many.
    tokens: the new tokens.
    """

    number: int
    prompt_tokens: int
    wanted: int
    arrival: float
    events: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def first_token_seconds(self) -> float | None:
        """Time to first token; None before it."""
        return self.events[0][0] - self.arrival if self.events else None

    @property
    def latency_seconds(self) -> float | None:
        """From arrival to the last token; None before the end."""
        return self.events[-1][0] - self.arrival if self.finished and self.events else None

    @property
    def seconds_per_token(self) -> float | None:
        """Time per output token; None where all tokens came at once."""
        if not self.finished or len(self.events) < 2:
            return None
        return (self.events[-1][0] - self.events[0][0]) / (len(self.tokens) - 1)

    @property
    def gaps(self) -> list[float]:
        """Time between deliveries."""
        return [later - sooner for (sooner, _), (later, _) in zip(self.events, self.events[1:], strict=False)]

    @property
    def spread_gaps(self) -> list[float]:
        """Inter-token latencies: each gap over the tokens that end it, once for each of them."""
        counts = [count for _, count in self.events[1:]]
        return [gap / n for gap, n in zip(self.gaps, counts, strict=True) for _ in range(n)]

    def meets(self, first_token_limit: float, token_limit: float) -> bool:
        """Whether it finished within both limits, in seconds; a request of one delivery needs the first alone."""
        first, per_token = self.first_token_seconds, self.seconds_per_token or 0.0
        return self.finished and first is not None and first <= first_token_limit and per_token <= token_limit

    def as_dict(self) -> dict:
        """Without texts and single events, ready for JSON."""
        return {
            "number": self.number, "prompt_tokens": self.prompt_tokens, "new_tokens": len(self.tokens),
            "arrival": self.arrival, "first_token_seconds": self.first_token_seconds,
            "latency_seconds": self.latency_seconds, "seconds_per_token": self.seconds_per_token,
            "deliveries": len(self.events),
        }  # fmt: skip


@dataclass(slots=True)
class Pass:
    """One run over all requests.

    records: of each request, in the order of the workload.
    steps: of each step, which requests got how many tokens: (number, count).
    counts: what the server itself counted.
    """

    records: list[RequestRecord]
    steps: list[list[tuple[int, int]]]
    counts: dict = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        ends = [record.events[-1][0] for record in self.records if record.events]
        return max(ends, default=0.0) - min((record.arrival for record in self.records), default=0.0)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """{"p50": …, "p90": …, "p99": …}; None without values.

    >>> percentiles([1.0, 2.0, 3.0, 4.0, 5.0])
    {'p50': 3.0, 'p90': 4.6, 'p99': 4.96}
    """
    if not values:
        return None
    found = np.percentile(np.asarray(values, dtype=np.float64), PERCENTILES)
    return {f"p{q}": round(float(value), 9) for q, value in zip(PERCENTILES, found, strict=True)}


def figures(run: Pass, first_token_limit: float, token_limit: float, streams: bool = True) -> dict:
    """All figures of one run; see the module. `streams` False: tokens are handed over with the whole text, so only
    throughput and latency mean something."""
    records, seconds = run.records, run.seconds
    tokens = sum(min(record.wanted, len(record.tokens)) for record in records)
    done = [record for record in records if record.finished]
    of = lambda name: [value for record in done if (value := getattr(record, name)) is not None]
    flat = lambda name: [value for record in done for value in getattr(record, name)]
    good = sum(record.meets(first_token_limit, token_limit) for record in done)
    rate = lambda count: count / seconds if seconds else None
    return {
        "seconds": seconds, "requests": len(records), "finished": len(done), "tokens": tokens,
        "tokens_per_second": rate(tokens), "requests_per_second": rate(len(done)),
        "first_token": percentiles(of("first_token_seconds")) if streams else None,
        "gap": percentiles(flat("gaps")) if streams else None,
        "itl": percentiles(flat("spread_gaps")) if streams else None,
        "tpot": percentiles(of("seconds_per_token")) if streams else None,
        "latency": percentiles(of("latency_seconds")),
        "goodput": rate(good) if streams else None, "steps": len(run.steps) or None,
    } | run.counts  # fmt: skip


def over_passes(passes: Sequence[dict]) -> dict:
    """Figures of several passes as one row: of numbers the median, with the least and the most as "range"."""
    row, spread = {}, {}
    for name in passes[0]:
        values = [one[name] for one in passes]
        if any(value is None for value in values):
            row[name] = None
        elif isinstance(values[0], dict):
            row[name] = {key: float(np.median([value[key] for value in values])) for key in values[0]}
        elif isinstance(values[0], int | float):
            row[name] = float(np.median(values))
            spread[name] = [min(values), max(values)]
        else:
            row[name] = values[-1]
    return row | {"passes": len(passes), "range": spread}
