"""The other experiments of `scripts.bench_serving`: shared prefixes, 8-bit pages, and a GPU's idle time."""

import time

import torch

import specdec
from attention.kv.page_format import pages_within
from scripts.common.entry import one_line
from scripts.serving_bench.methods import DRAFT, PLAIN, TOTAL, Bench, drafter_of, title_of
from scripts.serving_bench.servers import EngineServer, make_engine
from scripts.serving_bench.workload import Request, random_requests
from specdec.drafters.base import runners_of

TAIL, AFTER = (32, 128), 16  # tokens of a prompt after the shared prefix, and new ones
INT8_ROWS = 16  # that the memory of this experiment holds in the model's own dtype
IDLE_STEPS, IDLE_PROMPT = 40, 128


def measure_prefix(bench: Bench) -> dict:
    """Requests that begin with the same tokens and arrive together, with and without a draft model."""
    methods = [PLAIN, DRAFT if bench.models.tokenizer is not None else TOTAL]
    return {"rows": [_guarded(bench, method, _prefix_row, {"experiment": "prefix"}) for method in methods]}


def _guarded(bench: Bench, method: str, measure, about: dict) -> dict:
    row = about | {"method": method, "title": title_of(method), "error": None}
    try:
        return row | measure(bench, method)
    except Exception as error:
        return row | {"error": one_line(error)}


def _prefix_row(bench: Bench, method: str) -> dict:
    options, target = bench.options, specdec.ModelRunner(bench.models.target, mode=bench.options.mode)
    drafter, size = drafter_of(method, bench.models, target, options), target.page_size
    requests = random_requests(
        options.prefix_requests, TAIL, (AFTER, AFTER), bench.models.target.config.vocab_size, options.seed,
        options.prefix,
    )  # fmt: skip
    server = make_engine(target, drafter, requests, len(requests), options.tokens_per_step, options.memory, {})
    engine, runners = server.engine, [target, *runners_of(drafter)]
    try:
        handles = [engine.submit(list(one.prompt), max_new_tokens=one.new_tokens, do_sample=False) for one in requests]
        most, began = [0] * len(runners), time.perf_counter()
        while not engine.idle:
            engine.step()
            most = [max(n, one.cache.stats().owned) for n, one in zip(most, runners, strict=True)]
        seconds, saved = time.perf_counter() - began, engine.stats()["saved_tokens"]
        failed = next((handle.error for handle in handles if handle.error is not None), None)
        if failed is not None:
            raise failed
    finally:
        server.close()
    room = 1 + (drafter.traits.max_tokens if drafter is not None else 0)
    tails = [len(one.prompt) - options.prefix for one in requests]
    once = options.prefix // size * size  # what whole pages can share
    computed = sum(len(one.prompt) for one in requests) - saved
    pages = once // size + sum(-(-(len(one.prompt) - once + AFTER + room) // size) for one in requests)
    return {
        "requests": len(requests), "prefix": options.prefix, "seconds": seconds, "prompt_tokens_computed": computed,
        "prompt_tokens_least": options.prefix + sum(tails), "pages": most, "pages_least": pages,
        "work": computed / (options.prefix + sum(tails)), "memory": max(most) / pages,
    }  # fmt: skip


def measure_int8(bench: Bench) -> dict:
    """How many equal requests run at once in the same memory, with pages in the model's dtype and in 8 bits."""
    options = bench.options
    runners = {kind: specdec.ModelRunner(bench.models.target, mode="eager", kv_dtype=kind) for kind in (None, "int8")}
    forms = {kind: runner.page_format for kind, runner in runners.items()}
    size = forms[None].page_size
    request = Request(tuple(range(1, size)), 2)  # a page of prompt, and a second one for what follows
    memory = 2 * INT8_ROWS * forms[None].bytes
    most = {}
    for kind, runner in runners.items():
        engine = specdec.Engine(runner, memory=memory, max_tokens_per_step=options.tokens_per_step)
        try:
            for number in range(4 * INT8_ROWS):
                prompt = [1 + number, *request.prompt[1:]]
                engine.submit(prompt, max_new_tokens=request.new_tokens, do_sample=False)
            most[kind] = 0
            while not engine.idle:
                finished = engine.step()
                most[kind] = max(most[kind], engine.stats()["running"] + len(finished))
        finally:
            engine.close()
    budget = 1 << 36  # bytes; so many that single pages do not matter
    row = {
        "experiment": "int8", "error": None, "head_dim": forms[None].layout.common.head_dim,
        "bytes_per_page": {str(kind): form.bytes for kind, form in forms.items()},
        "pages": pages_within(budget, forms["int8"]) / pages_within(budget, forms[None]),
        "rows_at_once": {str(kind): count for kind, count in most.items()},
    }  # fmt: skip
    return {"rows": [row]}


def measure_idle(bench: Bench) -> dict:
    """How much of the time between its first and its last kernel a GPU runs none, while `idle_rows` texts decode."""
    if bench.options.device != "cuda":
        return {"rows": [{"experiment": "idle", "method": PLAIN, "error": "skipped: the profiler needs a GPU"}]}
    return {"rows": [_guarded(bench, PLAIN, _idle_row, {"experiment": "idle"})]}


def _idle_row(bench: Bench, method: str) -> dict:
    options, target = bench.options, specdec.ModelRunner(bench.models.target, mode=bench.options.mode)
    requests = random_requests(
        options.idle_rows, (IDLE_PROMPT, IDLE_PROMPT), (8 * IDLE_STEPS, 8 * IDLE_STEPS),
        bench.models.target.config.vocab_size, options.seed,
    )  # fmt: skip
    server = make_engine(target, None, requests, len(requests), options.tokens_per_step, options.memory, {})
    try:
        for number, one in enumerate(requests):
            server.submit(number, one)
        _steps(server, 2 * IDLE_STEPS)  # prompts, and captures
        unwatched = _timed(server)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            watched = _timed(server)
        if server.engine.stats()["running"] < len(requests):
            raise ValueError("texts ended while their steps were timed")
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profile.events() or ()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
    finally:
        server.close()
    busy, whole = covered(spans)
    return {
        "rows": len(requests), "steps": IDLE_STEPS, "seconds": unwatched, "seconds_watched": watched,
        "busy_seconds": busy / 1e6, "span_seconds": whole / 1e6, "kernels": len(spans), "idle": 1 - busy / whole,
        "idle_of_unwatched": 1 - busy / 1e6 / unwatched,
    }  # fmt: skip


def _steps(server: EngineServer, count: int) -> None:
    for _ in range(count):
        server.step(0.0)


def _timed(server: EngineServer) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    _steps(server, IDLE_STEPS)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def covered(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """How much of the time from the first beginning to the last end some span covers, and that time.

    Raises ValueError without spans.

    >>> covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    (4.0, 6.0)
    """
    if not spans:
        raise ValueError("the profiler saw no kernel")
    spans = sorted(spans)
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy, reached - spans[0][0]
