"""Methods side by side: opened together, warmed, and run in turn, so that a slow moment of the machine meets all."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from scripts.common.entry import one_line
from scripts.serving_bench.drive import Server, run_pass
from scripts.serving_bench.measures import Pass, figures, over_passes
from scripts.serving_bench.methods import PEER, PLAIN, Bench, note_of, opener, title_of
from scripts.serving_bench.workload import Request, salted, shortened

WARM_TOKENS = 24  # new tokens of the longest request that warms up
WARM_SALTS, SALTS = 8, 32  # tokens from which on passes have one of their own: to warm up, and those that count


@dataclass(slots=True)
class Runs:
    """What became of each method: its passes, or why there are none."""

    passes: dict[str, list[Pass]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    streams: dict[str, bool] = field(default_factory=dict)


def run_side_by_side(bench: Bench, methods: Sequence[str], requests: Sequence[Request], rows: int,
                     arrivals: Sequence[float] | None = None, clients: int | None = None) -> Runs:  # fmt: skip
    """Passes of all methods, back and forth, `options.repeats` of each; no further one of a method whose passes took
    `options.method_seconds` together. A method that fails leaves the passes that it had."""
    runs, servers = Runs(), dict[str, Server]()
    options = bench.options
    try:
        # ours first: they may move weights, and what transformers captures reads them where they lie
        for method in sorted(methods, key=lambda method: method == PEER):
            _guarded(runs, method, lambda method=method: _open(bench, method, requests, rows, servers))
            if method in servers:
                runs.passes[method], runs.streams[method] = [], servers[method].streams
                warm = lambda method=method: _warm_up(bench, method, servers[method], requests, rows, arrivals, clients)
                _guarded(runs, method, warm)
        for repeat in range(options.repeats):
            given = salted(requests, SALTS + repeat)
            for method in [method for method in methods if method in servers][:: -1 if repeat % 2 else 1]:
                spent = sum(one.seconds for one in runs.passes[method])
                if method in runs.errors or (repeat and spent > options.method_seconds):
                    continue
                call = lambda method=method, given=given: run_pass(servers[method], given, arrivals, clients)
                found = _guarded(runs, method, call)
                if found is not None:
                    runs.passes[method].append(found)
    finally:
        for method in list(servers):
            _guarded(runs, method, servers.pop(method).close)
        _free()
    return runs


def _warm_up(bench: Bench, method: str, server: Server, requests: Sequence[Request], rows: int,
             arrivals: Sequence[float] | None, clients: int | None) -> None:  # fmt: skip
    """Passes that do not count: one of short texts, and for ours whole ones, or of `options.warm_requests`, in which
    graphs are captured; requests arrive four times as fast there."""
    asked = requests[: bench.options.warm_requests]
    arrivals = None if arrivals is None else [at / 4 for at in arrivals]
    run_pass(server, salted(shortened(requests, max(4, rows), WARM_TOKENS), WARM_SALTS))
    for number in range(0 if method == PEER else bench.options.warm_passes):
        run_pass(server, salted(asked, WARM_SALTS + 1 + number), arrivals and arrivals[: len(asked)], clients)


def _open(bench: Bench, method: str, requests: Sequence[Request], rows: int, servers: dict[str, Server]) -> None:
    servers[method] = opener(method, bench, requests, rows)()


def _guarded(runs: Runs, method: str, call):
    """What `call` returns; an exception is the method's error."""
    try:
        return call()
    except Exception as error:
        runs.errors.setdefault(method, one_line(error))
        return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_of(runs: Runs, methods: Sequence[str], options, about: dict) -> list[dict]:
    """A row of the result for each method, `about` included: figures, texts compared, or an error."""
    compared = same_texts(runs)
    rows = []
    for method in methods:
        row = about | {"method": method, "title": title_of(method), "note": note_of(method)}
        passes = runs.passes.get(method)
        if passes:
            limits = options.ttft_limit, options.itl_limit
            row |= over_passes([figures(one, *limits, runs.streams[method]) for one in passes])
            row |= {"texts": compared.get(method)}
        rows.append(row | {"error": runs.errors.get(method)})
    return rows


def records_of(runs: Runs, about: dict) -> list[dict]:
    """A record of the result for each request of each pass."""
    return [
        about | {"method": method, "repeat": repeat} | record.as_dict()
        for method, passes in runs.passes.items()
        for repeat, one in enumerate(passes)
        for record in one.records
    ]


def same_texts(runs: Runs) -> dict[str, dict]:
    """For each method how many texts of its passes equal those of the engine without drafts, or else of the first."""
    measured = [method for method, passes in runs.passes.items() if passes]
    if not measured:
        return {}
    ours = [method for method in measured if method != PEER] or measured
    reference = PLAIN if PLAIN in measured else ours[0]
    found = {}
    for method in measured:
        pairs = [
            (mine.tokens, theirs.tokens)
            for one, other in zip(runs.passes[method], runs.passes[reference], strict=False)
            for mine, theirs in zip(one.records, other.records, strict=True)
        ]
        same = sum(mine == theirs for mine, theirs in pairs)
        found[method] = {"reference": reference, "equal": same, "of": len(pairs), "ours": method != PEER}
    return found
