"""What every row of the attention benchmark needs: timed and checked calls, the card's limits, bars, the record."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from scripts.attention_bench.cases import Case
from scripts.attention_bench.peers import Peer
from scripts.common.entry import one_line
from scripts.common.gpu_timing import CALLS, time_graph

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}  # relative; beyond it a result is wrong
QUANTISED_TOLERANCE = {"int8": 2e-2, "fp8": 8e-2}  # wrong, not merely above the bar


@dataclass(slots=True)
class Bench:
    """The device, what the card reaches, the peers, how to time, and the size of the rows: full, quick or toy."""

    device: torch.device
    limits: dict[str, float]
    peers: dict[str, Peer]
    size: str = "full"
    impl: str | None = None
    clock: Callable = time_graph
    calls: int = CALLS
    dtype: torch.dtype = torch.bfloat16
    # peers' results by shape: a row at another page of ours does not measure them again
    memo: dict = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes a second: the better of reading and copying."""
        return max(self.limits["read_bytes"], self.limits["copy_bytes"])

    def limit(self, num_bytes: float, flops: float) -> float:
        """Seconds below which no implementation gets on this card."""
        return max(num_bytes / self.bandwidth, flops / self.limits["matmul_flops"])

    def present(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that can be called here."""
        return [name for name in names if self.peers[name].absent is None]


def measure(name: str, call: Callable[[int], Any], check: Callable[[list], float], tolerance: float, clock: Callable,
            calls: int, **extra: Any) -> dict:  # fmt: skip
    """Time `call(0) … call(calls - 1)` and check the outputs: {"name", "error", "seconds", …}.

    A result that is wrong or failed has no time, but "wrong" or "failed"."""
    result = {"name": name, **extra}
    try:
        timing, outputs = clock(call, calls)
        error = check(outputs)
    except Exception as reason:  # a peer that refuses a shape must not end the benchmark
        return {**result, "failed": one_line(reason)}
    if not error <= tolerance:  # NaN is wrong
        return {**result, "error": error if math.isfinite(error) else None, "wrong": True}
    return {**result, "error": error, **timing._asdict()}


def bar(what: str, value: float | None, limit: float, at_most: bool = True) -> dict:
    """One requirement and whether it is met; None where a figure is missing."""
    met = None if value is None else value <= limit if at_most else value >= limit
    return {"what": what, "value": value, "limit": limit, "at_most": at_most, "met": met}


def ratio(a: dict | float | None, b: dict | float | None) -> float | None:
    """Seconds of one result over those of another; None where either has none."""
    a, b = (x.get("seconds") if isinstance(x, dict) else x for x in (a, b))
    return None if a is None or b is None else a / b


def best(results: Sequence[dict], name: str | None = None) -> dict | None:
    """The fastest right result (of that name), else None."""
    timed = [r for r in results if "seconds" in r and name in (None, r["name"])]
    return min(timed, key=lambda r: r["seconds"], default=None)


def record(bench: Bench, case: str, label: str, ours: dict, peers: Sequence[dict], num_bytes: float, flops: float,
           bars: Sequence[dict] = (), **extra: Any) -> dict:  # fmt: skip
    """A row as it is printed and saved, with the rates achieved and the fraction of the limit."""
    seconds, limit = ours.get("seconds"), bench.limit(num_bytes, flops)
    rates = {}
    if seconds is not None:
        rates = {"bytes_per_s": num_bytes / seconds, "flops_per_s": flops / seconds, "fraction": limit / seconds}
    memory_bound = num_bytes / bench.bandwidth >= flops / bench.limits["matmul_flops"]
    return {
        "case": case,
        "label": label,
        "ours": {**ours, **rates},
        "peers": list(peers),
        "bytes": num_bytes,
        "flops": flops,
        "limit_seconds": limit,
        "limited_by": "memory" if memory_bound else "matrix units",
        "bars": list(bars),
        **extra,
    }


def shape_of(case: Case) -> dict:
    """The case's numbers for the record."""
    names = ("batch", "context", "queries", "heads", "kv_heads", "head_dim", "page", "kv_dtype")
    numbers = {name: getattr(case, name) for name in names}
    return {**numbers, "tree": bool(case.parents), "dtype": str(case.dtype).removeprefix("torch.")}


def thousands(number: int) -> str:
    """8192 -> "8k"."""
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)
