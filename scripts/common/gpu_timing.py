"""How long a GPU call takes, and what the card itself can do.

Calls are captured into one CUDA graph, ten or more in a row, and the graph is replayed: below 100 µs, launch gaps would
otherwise hide the kernel. A call gets its index, so that each can work on other memory: data that fits the level-2
cache is spread over enough copies (`copies_beyond_cache`) that no call finds what an earlier one left there, as in a
model, where every layer has its own keys."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

CALLS = 10  # in one graph, at least
COPIES = 48  # of small data, at most
LONG = 2e-3  # a call of this many seconds needs no company in its graph: launch gaps are below 1 % of it


class Timing(NamedTuple):
    """Seconds a call: median over the replays, half the distance from 10th to 90th percentile, and the counts."""

    seconds: float
    spread: float
    calls: int
    replays: int


def copies_beyond_cache(num_bytes: int, cache_bytes: int) -> int:
    """How many copies of `num_bytes` of data make 3 times the level-2 cache, to rotate over; `COPIES` at most."""
    return max(1, min(COPIES, -(-3 * cache_bytes // max(1, num_bytes))))


def cache_bytes(device: torch.device) -> int:
    """Size of the level-2 cache; 0 on a CPU, where nothing is rotated."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def _summary(seconds: list[float], calls: int) -> Timing:
    values = torch.tensor(seconds, dtype=torch.float64) / calls
    low, median, high = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Timing(median, (high - low) / 2, calls, len(seconds))


def _replay(run: Callable[[], None], calls: int, budget: float) -> Timing:
    """Replay for about `budget` seconds, 5 to 50 times, after one replay that is not counted."""
    elapsed = []
    total, start, end = 0.0, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for index in range(51):
        start.record()
        run()
        end.record()
        end.synchronize()
        if index:
            elapsed.append(start.elapsed_time(end) / 1e3)
            total += elapsed[-1]
        if total > budget and len(elapsed) >= 5:
            break
    return _summary(elapsed, calls)


def _seconds_of(call: Callable[[int], Any], stream: torch.cuda.Stream) -> float:
    """One call by the wall clock, alone on the stream."""
    stream.synchronize()
    began = time.perf_counter()
    call(0)
    stream.synchronize()
    return time.perf_counter() - began


def time_graph(call: Callable[[int], Any], calls: int = CALLS, budget: float = 0.1) -> tuple[Timing, list[Any]]:
    """Time `call(0) … call(calls - 1)` as one CUDA graph; returns their outputs too, set to NaN before the last replay.

    A call that takes longer than `LONG`, the shortest of three, is captured alone. Each call runs outside the graph
    first and may compile there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
        calls = 1 if min(_seconds_of(call, stream) for _ in range(3)) > LONG else calls
        for index in range(1, calls):
            call(index)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = [call(index) for index in range(calls)]
        timing = _replay(graph.replay, calls, budget)
        for output in outputs:
            _poison(output)
        graph.replay()
        stream.synchronize()
        outputs = [_copy(output) for output in outputs]
    torch.cuda.current_stream().wait_stream(stream)
    return timing, outputs


def time_eager(call: Callable[[int], Any], calls: int = CALLS, budget: float = 0.1) -> tuple[Timing, list[Any]]:
    """As `time_graph` without a graph, for long calls that cannot be captured (backward passes)."""
    outputs = [call(0)]

    def run():
        for index in range(calls):
            outputs[0] = call(index)

    return _replay(run, calls, budget), outputs


def time_on_cpu(call: Callable[[int], Any], calls: int = CALLS, budget: float = 0.0) -> tuple[Timing, list[Any]]:
    """The same by the wall clock, to test the benchmark's path without a GPU; its figures mean nothing."""
    seconds = []
    while not seconds or sum(seconds) < budget:
        began = time.perf_counter()
        outputs = [call(index) for index in range(calls)]
        seconds.append(time.perf_counter() - began)
    return _summary(seconds, calls), outputs


def _poison(output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point():
        output.fill_(float("nan"))
    elif isinstance(output, tuple | list):
        for part in output:
            _poison(part)


def _copy(output: Any) -> Any:
    """Out of the graph's own memory, which goes when the graph does."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(_copy(part) for part in output) if isinstance(output, tuple | list) else output


def ceilings(device: torch.device, megabytes: int = 4096, size: int = 8192,
             dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:  # fmt: skip
    """What the card reaches: copy (bytes read plus written) and read in bytes/s, a matrix product in FLOP/s.
    Random data, not zeros.
    """
    clock = time_graph if device.type == "cuda" else partial(time_on_cpu, budget=0.2)
    copy, read = _memory_seconds(device, megabytes << 18, clock)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = clock(lambda _: a @ b, calls=CALLS)[0].seconds
    return {
        "copy_bytes": (megabytes << 21) / copy,
        "read_bytes": (megabytes << 20) / read,
        "matmul_flops": 2 * size**3 / product,
    }


def _memory_seconds(device: torch.device, numbers: int, clock: Callable) -> tuple[float, float]:
    """Seconds to copy, and to add up, that many float32 numbers."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copy = clock(lambda _: target.copy_(source), calls=1)[0].seconds
    # the quicker of two reductions: neither is tuned for every shape on every card
    read = min(clock(lambda _, rows=rows: source.view(rows, -1).sum(1), calls=1)[0].seconds for rows in (1, 1 << 12))
    return copy, read
