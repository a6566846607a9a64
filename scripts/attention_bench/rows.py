"""The benchmark's rows of paged attention: decode, chains, trees, other shapes, 8-bit pages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attention import paged_attention
from scripts.attention_bench import peers as attention_peers
from scripts.attention_bench.bench import (
    QUANTISED_TOLERANCE,
    TOLERANCE,
    Bench,
    bar,
    best,
    measure,
    ratio,
    record,
    shape_of,
    thousands,
)
from scripts.attention_bench.cases import Case, Memory, chain, prepare, random_tree, sampled_error, worst
from scripts.common.entry import one_line
from scripts.common.gpu_timing import cache_bytes, copies_beyond_cache

QUANTISED_BAR = {"int8": 1e-2, "fp8": 2e-2}


def _check(memory: Memory, table: Tensor, size: int, layers: int, visible: Tensor | None) -> Callable[[list], float]:
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
        layer = index % layers
        return paged_attention(memory.queries[layer], layer, memory.batch, memory.scale, impl=bench.impl)

    return measure(name, call, check, tolerance, bench.clock, max(bench.calls, layers), page=case.page)


def measure_peer(bench: Bench, memory: Memory, name: str) -> dict:
    """One paged peer at its best page size; FlexAttention has no pages here, and FA3's time for a tree is causal."""
    case, layers, found, flex = memory.case, len(memory.queries), [], name == "FlexAttention"
    no_tree = case.parents and name == "FA3"
    causal = replace(case, parents=chain(case.queries)).visible(bench.device) if no_tree else None
    for size in (1,) if flex else attention_peers.PAGE_SIZES if bench.size == "full" else (64,):
        shown = {} if flex else {"page": size}
        try:
            call = attention_peers.flex_tree(memory) if flex else attention_peers.PAGED[name](memory, size)
        except Exception as error:
            found.append({"name": name, **shown, "failed": one_line(error)})
            continue
        check = _check(memory, memory.table(size), size, layers, causal)
        one_layer, calls = lambda i, call=call: call(i % layers), max(bench.calls, layers)
        found.append(measure(name, one_layer, check, TOLERANCE[case.dtype], bench.clock, calls, **shown))
    chosen = dict(best(found) or found[0])
    if causal is not None:
        chosen["note"] = "causal, no tree"
    if len(found) > 1:
        chosen["pages"] = {str(r["page"]): r.get("seconds") for r in found}
    return chosen


def paged_row(
    bench: Bench, case: Case, label: str, peers: Sequence[str], bars: Callable[[dict, list[dict]], list[dict]]
) -> dict:
    """One row: prepare the memory, measure ours, then the peers, unless the same shape was measured before."""
    layers = copies_beyond_cache(case.kv_bytes, cache_bytes(bench.device))
    torch.manual_seed(0)
    memory = prepare(case, bench.device, layers)
    ours, measured = measure_ours(bench, memory), []
    for name in bench.present(peers):
        key = (name, case.batch, case.context, case.parents or case.queries)
        if key not in bench.memo:
            bench.memo[key] = measure_peer(bench, memory, name)
        measured.append(bench.memo[key])
    wanted, shape = bars(ours, measured), shape_of(case)
    return record(bench, case.name, label, ours, measured, case.bytes, case.flops, wanted, layers=layers, shape=shape)


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
        case = _case(bench, "verify", batch, context, tokens)
        yield paged_row(bench, case, label, ("FA3", "FlashInfer"), _against_both)


def tree_rows(bench: Bench) -> Iterable[dict]:
    """A token tree a sequence, at the default page; then the trees of 64 once more over pages of 16."""
    grid = [(n, c, b) for n in (64, 26, 200) for c in (1024, 8192, 32768) for b in (1, 8, 32)]
    quick = [(64, c, b) for c in (1024, 8192) for b in (1, 8, 32)] + [(26, 8192, 8), (200, 8192, 8)]
    for nodes, context, batch in _grid(bench, grid, quick, ((5, 70, 2),)):
        case = _case(bench, "tree", batch, context, nodes, parents=random_tree(nodes))

        def bars(ours, peers, context=context):
            found = [bar("time over FA3 causal", ratio(ours, best(peers, "FA3")), 1.25)]
            slower = ratio(best(peers, "FlashInfer"), ours)
            more = [bar("FlashInfer's time over ours", slower, 3.0, at_most=False)] if context >= 8192 else []
            return found + more

        flex = ("FlexAttention",) if nodes == 64 and context == 8192 else ()  # each shape costs it a compilation
        label = f"{nodes} nodes, B {batch}, context {thousands(context)}"
        yield paged_row(bench, case, label, ("FA3", "FlashInfer", *flex), bars)
    grid, nodes = [(c, b) for c in (1024, 8192, 32768) for b in (1, 8, 32)], 5 if bench.size == "toy" else 64
    for context, batch in _grid(bench, grid, ((8192, 8),), ((70, 2),)):
        case = _case(bench, "tree", batch, context, nodes, parents=random_tree(nodes), page=16)
        bars = lambda ours, peers: [bar("time over FA3 causal", ratio(ours, best(peers, "FA3")), 1.6)]
        yield paged_row(bench, case, f"{nodes} nodes, B {batch}, context {thousands(context)}, page 16", ("FA3",), bars)


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
            over = None if rate is None or "seconds" not in ours else rate * ours["seconds"] / case.bytes
            return [bar("standard shape's bytes/s over these", over, 1.5)]

        yield paged_row(bench, case, f"{label} (B {batch}, context {thousands(context)})", (), bars)


def quant_rows(bench: Bench) -> Iterable[dict]:
    """8-bit pages against 16-bit ones, decode; the error is that against the keys and values before quantisation."""
    batch, context = (2, 70) if bench.size == "toy" else (64, 4096)
    label = f"unquantised, B {batch}, context {thousands(context)}"
    wide = paged_row(bench, _case(bench, "quant", batch, context), label, (), lambda *_: [])
    yield wide
    for kv_dtype in ("int8", "fp8"):
        case = _case(bench, "quant", batch, context, kv_dtype=kv_dtype)

        torch.manual_seed(0)
        centred = measure_ours(bench, prepare(case, bench.device, 1, channel_means=True))

        def bars(ours, _peers, kv_dtype=kv_dtype, centred=centred):
            faster = bar("unquantised pages' time over these", ratio(wide["ours"], ours), 1.6, at_most=False)
            limit = QUANTISED_BAR[kv_dtype]
            about_0 = bar("relative error, values about 0", ours.get("error"), limit)
            about_mean = bar("relative error, values about a mean per channel", centred.get("error"), limit)
            return [faster, about_0, about_mean]

        yield paged_row(bench, case, f"{kv_dtype}, B {batch}, context {thousands(context)}", (), bars)
