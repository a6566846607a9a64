"""The experiments of `scripts.bench_serving` that compare methods: each cell of one is a function to its rows."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from scripts.common.gpu_timing import ceilings
from scripts.generate_bench.models import read_texts
from scripts.serving_bench.methods import PEER, PLAIN, STATIC, Bench
from scripts.serving_bench.roofline import card_of_model, least_seconds, work_of
from scripts.serving_bench.side_by_side import Runs, records_of, rows_of, run_side_by_side
from scripts.serving_bench.special import measure_idle, measure_int8, measure_prefix
from scripts.serving_bench.workload import Request, poisson_arrivals, random_requests, read_trace, text_requests

REQUESTS, CLIENTS, LOAD, SWEEP, PREFIX, INT8, IDLE = (
    "requests", "clients", "load", "sweep", "prefix", "int8", "idle",
)  # fmt: skip
EXPERIMENTS = (REQUESTS, CLIENTS, LOAD, SWEEP, PREFIX, INT8, IDLE)
Cell = Callable[[], dict]


def workload(bench: Bench, count: int) -> list[Request]:
    """`count` requests: of the trace, of texts, or of random tokens; a trace with fewer gives all that it has."""
    options, config = bench.options, bench.models.target.config
    tokenizer, output = bench.models.tokenizer, tuple(options.output)
    if options.trace is not None:
        return read_trace(options.trace, tokenizer, config.vocab_size, options.seed)[:count]
    if tokenizer is None:
        return random_requests(count, tuple(options.prompt), output, config.vocab_size, options.seed)
    texts = [tokenizer(text).input_ids[: options.prompt[1]] for text in read_texts(None)]
    return text_requests(texts, count, output, options.seed)


def cells(bench: Bench) -> Iterator[tuple[str, Cell]]:
    """The name of each cell of the chosen experiments, and a function that measures it: {"rows", "records"}."""
    options = bench.options
    special = {PREFIX: measure_prefix, INT8: measure_int8, IDLE: measure_idle}
    for experiment in options.experiments:
        if experiment == REQUESTS:
            yield REQUESTS, partial(measure_requests, bench)
        elif experiment == CLIENTS:
            for clients in options.clients:
                yield f"{CLIENTS}-{clients}", partial(measure_clients, bench, clients)
        elif experiment == LOAD:
            for rate in options.rates or [None]:
                yield f"{LOAD}-{'trace' if rate is None else f'{rate:g}'}", partial(measure_load, bench, rate)
        elif experiment == SWEEP:
            for batch in options.batches:
                yield f"{SWEEP}-{batch}", partial(measure_batch, bench, batch)
        else:
            yield experiment, partial(special[experiment], bench)


def engines(methods) -> list[str]:
    """Those of the methods that are engines."""
    return [method for method in methods if method != PEER and not method.startswith(STATIC)]


def measure_requests(bench: Bench) -> dict:
    """All requests are there at once; with the roofline of the engine without drafts."""
    options = bench.options
    requests = workload(bench, options.requests)
    runs = run_side_by_side(bench, options.methods, requests, options.rows)
    found = _found(bench, runs, options.methods, {"experiment": REQUESTS, "rows": options.rows})
    if runs.passes.get(PLAIN):
        found["roofline"] = roofline(bench, runs)
    return found


def roofline(bench: Bench, runs: Runs) -> dict:
    """The least seconds of each pass of the engine without drafts over those that it took."""
    options = bench.options
    device = torch.device(options.device)
    dtype = bench.models.target.dtype
    limits = ceilings(device) if device.type == "cuda" else ceilings(device, megabytes=16, size=256, dtype=dtype)
    card = card_of_model(bench.models.target, limits)
    works = [work_of(one, options.tokens_per_step) for one in runs.passes[PLAIN]]
    least = [least_seconds(card, work) for work in works]
    shares = sorted(seconds / one.seconds for seconds, one in zip(least, runs.passes[PLAIN], strict=True))
    rows, prompts, kept = map(sum, zip(*works[0], strict=True))
    return {
        "share": shares[len(shares) // 2], "shares": shares, "least_seconds": least[0],
        "seconds": runs.passes[PLAIN][0].seconds, "steps": len(works[0]), "row_steps": rows, "prompt_tokens": prompts,
        "kv_tokens_read": kept, "bandwidth": card.bandwidth, "peak": card.peak, "weight_bytes": card.weight_bytes,
        "kv_bytes": card.kv_bytes, "ceilings": limits,
    }  # fmt: skip


def measure_clients(bench: Bench, clients: int) -> dict:
    """So many clients, each with one request in flight."""
    options = bench.options
    requests = workload(bench, options.requests)
    methods = engines(options.methods)
    runs = run_side_by_side(bench, methods, requests, min(clients, options.rows), clients=clients)
    return _found(bench, runs, methods, {"experiment": CLIENTS, "clients": clients})


def measure_load(bench: Bench, rate: float | None) -> dict:
    """Requests arrive at `rate` a second, whatever is still at work; None: as the trace says.

    Raises ValueError for a trace without arrivals."""
    options = bench.options
    requests = workload(bench, options.requests)
    if rate is None:
        arrivals = [one.arrival for one in requests if one.arrival is not None]
        if len(arrivals) < len(requests):
            raise ValueError("without --rates the load is that of a --trace whose requests have an arrival")
    else:
        arrivals = poisson_arrivals(len(requests), rate, options.seed)
    methods = options.methods
    runs = run_side_by_side(bench, methods, requests, options.rows, arrivals=arrivals)
    return _found(bench, runs, methods, {"experiment": LOAD, "rate": rate})


def measure_batch(bench: Bench, batch: int) -> dict:
    """max(`options.least_requests`, 4 x batch) requests, `batch` of them at the same time."""
    options = bench.options
    requests = workload(bench, max(options.least_requests, 4 * batch))
    methods = engines(options.methods)
    runs = run_side_by_side(bench, methods, requests, batch)
    return _found(bench, runs, methods, {"experiment": SWEEP, "batch": batch})


def _found(bench: Bench, runs: Runs, methods, about: dict) -> dict:
    return {"rows": rows_of(runs, methods, bench.options, about), "records": records_of(runs, about)}
