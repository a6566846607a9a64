"""How requests reach a server: at given times, all at once, or from clients that wait for their answers."""

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from scripts.serving_bench.measures import Pass, RequestRecord
from scripts.serving_bench.workload import Request

SHORT, LONG = 0.002, 0.2  # seconds that a step may wait for tokens: while requests are still to come, and after


class Delivery(NamedTuple):
    """Tokens of a request: its number, the time by `time.perf_counter`, the tokens, and whether they are the last."""

    number: int
    time: float
    tokens: Sequence[int]
    last: bool


class Server(Protocol):
    """Whatever decodes requests.

    streams: whether tokens are handed over as they come, rather than with the whole text.
    has_steps: whether a call of `step` is one step of its own.
    """

    streams: bool
    has_steps: bool

    def submit(self, number: int, request: Request) -> None:
        """Take a request; numbers are those of its run."""

    def step(self, wait: float) -> list[Delivery]:
        """Decode on, or wait at most so many seconds for what decodes by itself -> what has come since."""

    def counts(self) -> dict:
        """Figures of its own since the last call."""

    def close(self) -> None:
        """Give memory back."""


def run_pass(server: Server, requests: Sequence[Request], arrivals: Sequence[float] | None = None,
             clients: int | None = None) -> Pass:  # fmt: skip
    """Run all requests to their end.

    arrivals: seconds after the beginning at which each is submitted, whatever is still at work (open loop).
    clients: so many send one request each and the next one when it is answered (closed loop; None: all at once)."""
    server.counts()
    first = len(requests) if clients is None else clients
    due = list(arrivals) if arrivals is not None else [0.0] * min(first, len(requests))
    records: list[RequestRecord] = []
    steps: list[list[tuple[int, int]]] = []
    running, began = 0, time.perf_counter()
    while running or len(records) < len(requests):
        while len(records) < len(due) and due[len(records)] <= time.perf_counter() - began:
            number = len(records)
            one = requests[number]
            records.append(RequestRecord(number, len(one.prompt), one.new_tokens, due[number]))
            server.submit(number, one)
            running += 1
        if not running:
            time.sleep(max(0.0, min(SHORT, due[len(records)] - (time.perf_counter() - began))))
            continue
        delivered = server.step(SHORT if len(records) < len(due) else LONG)
        if server.has_steps:
            steps.append([(one.number, len(one.tokens)) for one in delivered if one.tokens])
        for one in delivered:
            record = records[one.number]
            if one.tokens:
                record.events.append((one.time - began, len(one.tokens)))
                record.tokens += one.tokens
            if one.last:
                record.finished, running = True, running - 1
                if clients is not None and len(due) < len(requests):
                    due.append(time.perf_counter() - began)
    return Pass(records, steps, server.counts())
