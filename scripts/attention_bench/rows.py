"""Measure one row of the attention benchmark: ours and each peer, timed, checked, and held against the limit and the
bar.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attention import paged_attention
from scripts.attention_bench import peers as attention_peers
from scripts.attention_bench.cases import Case, Memory, chain, prepare, random_tree, sampled_error, worst
from scripts.common.gpu_timing import CALLS, cache_bytes, copies_beyond_cache, time_graph
from scripts.common.result_files import one_line

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}  # relative; beyond it a result is wrong
QUANTISED_TOLERANCE = {"int8": 2e-2, "fp8": 8e-2}  # wrong, not merely above the bar
QUANTISED_BAR = {"int8": 1e-2, "fp8": 2e-2}


@dataclass(slots=True)
class Bench:
    """What every row needs: the device, what the card reaches, who is here, how to time, and how large to be (full,
    quick or toy).
    """

    device: torch.device
    limits: dict[str, float]
    peers: dict[str, attention_peers.Peer]
    size: str = "full"
    impl: str | None = None
    clock: Callable = time_graph
    calls: int = CALLS
    dtype: torch.dtype = torch.bfloat16
    memo: dict = field(
        default_factory=dict
    )  # peers' results by shape: a row at another page of ours needs no second look at them

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


def measure(
    name: str,
    call: Callable[[int], Any],
    check: Callable[[list], float],
    tolerance: float,
    clock: Callable,
    calls: int,
    **extra: Any,
) -> dict:
    """Time `call(0) … call(calls - 1)` and judge the outputs: {"name", "error", "seconds", …}; "wrong" or "failed"
    stand in place of the time.
    """
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


def record(
    bench: Bench,
    case: str,
    label: str,
    ours: dict,
    peers: Sequence[dict],
    num_bytes: float,
    flops: float,
    bars: Sequence[dict] = (),
    **extra: Any,
) -> dict:
    """A row as it is printed and saved: achieved rates and the fraction of the limit are worked out here."""
    seconds, limit = ours.get("seconds"), bench.limit(num_bytes, flops)
    rates = (
        {}
        if seconds is None
        else {"bytes_per_s": num_bytes / seconds, "flops_per_s": flops / seconds, "fraction": limit / seconds}
    )
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


def _check(
    memory: Memory, table: Tensor, size: int, layers: int, visible: Tensor | None
) -> Callable[[list[Tensor]], float]:
    """The larger error of the first and the last call."""
    return lambda outputs: worst(
        sampled_error(memory, outputs[i], i % layers, table, size, visible) for i in {0, len(outputs) - 1}
    )


def measure_ours(bench: Bench, memory: Memory, name: str = "ours") -> dict:
    """The library's paged attention over that memory, calls rotating over its layers."""
    case, layers = memory.case, len(memory.queries)
    tolerance = TOLERANCE[case.dtype] if case.kv_dtype is None else QUANTISED_TOLERANCE[case.kv_dtype]
    check = _check(memory, memory.batch.block_tables, case.page, layers, None)

    def call(index: int) -> Tensor:
        return paged_attention(
            memory.queries[index % layers], index % layers, memory.batch, memory.scale, impl=bench.impl
        )

    return measure(name, call, check, tolerance, bench.clock, max(bench.calls, layers), page=case.page)


def measure_peer(bench: Bench, memory: Memory, name: str) -> dict:
    """One paged peer at the best page size that it takes; FlexAttention has no pages here. FA3's tree is its causal
    time.
    """
    case, layers, found = memory.case, len(memory.queries), []
    causal = (
        replace(case, parents=chain(case.queries)).visible(bench.device) if case.parents and name == "FA3" else None
    )
    for size in (1,) if name == "FlexAttention" else attention_peers.PAGE_SIZES if bench.size == "full" else (64,):
        shown = {} if name == "FlexAttention" else {"page": size}
        try:
            build = attention_peers.flex_tree if name == "FlexAttention" else attention_peers.PAGED[name]
            call = build(memory) if name == "FlexAttention" else build(memory, size)
        except Exception as error:
            found.append({"name": name, **shown, "failed": one_line(error)})
            continue
        check = _check(memory, memory.table(size), size, layers, causal)
        found.append(
            measure(
                name,
                lambda i, call=call: call(i % layers),
                check,
                TOLERANCE[case.dtype],
                bench.clock,
                max(bench.calls, layers),
                **shown,
            )
        )
    chosen = dict(best(found) or found[0])
    if causal is not None:
        chosen["note"] = "causal, no tree"
    if len(found) > 1:
        chosen["pages"] = {str(r["page"]): r.get("seconds") for r in found}
    return chosen


def paged_row(
    bench: Bench, case: Case, label: str, peers: Sequence[str], bars: Callable[[dict, list[dict]], list[dict]]
) -> dict:
    """One row: prepare the memory, measure ours, then the peers that are here (or what they gave for the same shape
    before).
    """
    layers = copies_beyond_cache(case.kv_bytes, cache_bytes(bench.device))
    torch.manual_seed(0)
    memory = prepare(case, bench.device, layers)
    ours, measured = measure_ours(bench, memory), []
    for name in bench.present(peers):
        key = (name, case.batch, case.context, case.parents or case.queries)
        if key not in bench.memo:
            bench.memo[key] = measure_peer(bench, memory, name)
        measured.append(bench.memo[key])
    return record(
        bench,
        case.name,
        label,
        ours,
        measured,
        case.bytes,
        case.flops,
        bars(ours, measured),
        layers=layers,
        shape=shape_of(case),
    )


def shape_of(case: Case) -> dict:
    """The case's numbers for the record."""
    names = ("batch", "context", "queries", "heads", "kv_heads", "head_dim", "page", "kv_dtype")
    return {
        **{name: getattr(case, name) for name in names},
        "tree": bool(case.parents),
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def thousands(number: int) -> str:
    """8192 -> "8k"."""
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def _grid(bench: Bench, full: Sequence, quick: Sequence, toy: Sequence) -> Sequence:
    return {"full": full, "quick": quick, "toy": toy}[bench.size]


def _case(bench: Bench, name: str, batch: int, context: int, queries: int = 1, **other: Any) -> Case:
    """A case in the benchmark's dtype; toy ones have few and small heads."""
    toy = dict(heads=4, kv_heads=2, head_dim=64) if bench.size == "toy" else {}
    return Case(name, batch, context, queries, dtype=bench.dtype, **{**toy, **other})


def _against_both(ours: dict, peers: list[dict]) -> list[dict]:
    return [bar("time over the faster of FA3 and FlashInfer", ratio(ours, best(peers)), 1.1)]


def decode_rows(bench: Bench) -> Iterable[dict]:
    """One new token a sequence."""
    grid = [(b, c) for b in (1, 8, 32, 64, 128) for c in (1024, 4096, 8192, 32768)]
    for batch, context in _grid(bench, grid, ((1, 8192), (64, 4096), (128, 1024)), ((2, 70),)):
        case = _case(bench, "decode", batch, context)

        def bars(ours, peers, case=case):
            rate = case.bytes / ours["seconds"] / 1e12 if "seconds" in ours else None
            wanted = [bar("TB/s", rate, 4.0, at_most=False)] if (case.batch, case.context) == (64, 4096) else []
            return _against_both(ours, peers) + wanted

        yield paged_row(bench, case, f"B {batch}, context {thousands(context)}", ("FA3", "FlashInfer"), bars)


def verify_rows(bench: Bench) -> Iterable[dict]:
    """A chain of 2 to 8 tokens a sequence."""
    grid = [(b, c, n) for b, c in ((1, 8192), (64, 4096)) for n in (2, 4, 6, 8)]
    for batch, context, tokens in _grid(bench, grid, ((1, 8192, 6), (64, 4096, 6)), ((2, 70, 3),)):
        label = f"{tokens} tokens, B {batch}, context {thousands(context)}"
        yield paged_row(
            bench, _case(bench, "verify", batch, context, tokens), label, ("FA3", "FlashInfer"), _against_both
        )


def tree_rows(bench: Bench) -> Iterable[dict]:
    """A token tree a sequence, at the default page; then the trees of 64 once more over pages of 16."""
    grid = [(n, c, b) for n in (64, 26, 200) for c in (1024, 8192, 32768) for b in (1, 8, 32)]
    for nodes, context, batch in _grid(
        bench,
        grid,
        [(64, c, b) for c in (1024, 8192) for b in (1, 8, 32)] + [(26, 8192, 8), (200, 8192, 8)],
        ((5, 70, 2),),
    ):
        case = _case(bench, "tree", batch, context, nodes, parents=random_tree(nodes))

        def bars(ours, peers, context=context):
            slower = (
                [bar("FlashInfer's time over ours", ratio(best(peers, "FlashInfer"), ours), 3.0, at_most=False)]
                if context >= 8192
                else []
            )
            return [bar("time over FA3 causal", ratio(ours, best(peers, "FA3")), 1.25), *slower]

        flex = ("FlexAttention",) if nodes == 64 and context == 8192 else ()  # each shape costs it a compilation
        yield paged_row(
            bench, case, f"{nodes} nodes, B {batch}, context {thousands(context)}", ("FA3", "FlashInfer", *flex), bars
        )
    for context, batch in _grid(
        bench, [(c, b) for c in (1024, 8192, 32768) for b in (1, 8, 32)], ((8192, 8),), ((70, 2),)
    ):
        nodes = 5 if bench.size == "toy" else 64
        case = _case(bench, "tree", batch, context, nodes, parents=random_tree(nodes), page=16)
        yield paged_row(
            bench,
            case,
            f"{nodes} nodes, B {batch}, context {thousands(context)}, page 16",
            ("FA3",),
            lambda ours, peers: [bar("time over FA3 causal", ratio(ours, best(peers, "FA3")), 1.6)],
        )


def shape_rows(bench: Bench) -> Iterable[dict]:
    """Decode with other head dims, groups and pages, held against the standard shape's bytes per second."""
    batch, context = (2, 70) if bench.size == "toy" else (64, 4096)
    standard = paged_row(bench, _case(bench, "shapes", batch, context), "standard", (), lambda *_: [])
    yield standard
    kv_heads = standard["shape"]["kv_heads"]
    changes = [(f"D {dim}", dict(head_dim=dim)) for dim in (64, 80, 96, 256)]
    changes += [(f"group {group}", dict(heads=group * kv_heads)) for group in (1, 4, 7, 8)]
    changes += [(f"page {page}", dict(page=page)) for page in (1, 16, 64, 256)]
    for label, change in changes if bench.size != "quick" else changes[::3]:
        case = _case(bench, "shapes", batch, context, **change)
        rate = standard["ours"].get("bytes_per_s")

        def bars(ours, _peers, case=case, rate=rate):
            return [
                bar(
                    "standard shape's bytes/s over these",
                    None if rate is None or "seconds" not in ours else rate * ours["seconds"] / case.bytes,
                    1.5,
                )
            ]

        yield paged_row(bench, case, f"{label} (B {batch}, context {thousands(context)})", (), bars)


def quant_rows(bench: Bench) -> Iterable[dict]:
    """8-bit pages against 16-bit ones, decode; the error is that against the keys and values before quantisation."""
    batch, context = (2, 70) if bench.size == "toy" else (64, 4096)
    wide = paged_row(
        bench,
        _case(bench, "quant", batch, context),
        f"unquantised, B {batch}, context {thousands(context)}",
        (),
        lambda *_: [],
    )
    yield wide
    for kv_dtype in ("int8", "fp8"):
        case = _case(bench, "quant", batch, context, kv_dtype=kv_dtype)

        torch.manual_seed(0)
        centred = measure_ours(bench, prepare(case, bench.device, 1, channel_means=True))

        def bars(ours, _peers, kv_dtype=kv_dtype, centred=centred):
            faster = bar("unquantised pages' time over these", ratio(wide["ours"], ours), 1.6, at_most=False)
            errors = (
                ("relative error, values about 0", ours),
                ("relative error, values about a mean per channel", centred),
            )
            return [faster, *(bar(what, result.get("error"), QUANTISED_BAR[kv_dtype]) for what, result in errors)]

        yield paged_row(bench, case, f"{kv_dtype}, B {batch}, context {thousands(context)}", (), bars)
