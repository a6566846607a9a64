"""The benchmark's rows of writes: keys and values into pages, accepted paths moved, pages copied."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from attention.kv.move import move_rows
from attention.kv.quantization import quantise
from attention.kv.write import write_kv
from scripts.attention_bench.bench import Bench, measure, record, shape_of
from scripts.attention_bench.cases import Case, filled_cache, relative_error, worst
from scripts.common.gpu_timing import cache_bytes, copies_beyond_cache


def write_rows(bench: Bench) -> Iterable[dict]:
    """Keys and values scattered into pages, also quantised; accepted paths moved in all layers; page copies."""
    toy = bench.size == "toy"
    small = dict(heads=4, kv_heads=2, head_dim=64) if toy else {}
    tokens = 8 if toy else 8192
    for kv_dtype in (None, "int8", "fp8"):
        yield _scatter_row(bench, Case("write", 1, 2 * tokens, kv_dtype=kv_dtype, dtype=bench.dtype, **small), tokens)
    yield from _move_rows(bench, Case("write", 1, 2 * tokens, dtype=bench.dtype, **small), 2 if toy else 32)


def _scatter_row(bench: Bench, case: Case, tokens: int) -> dict:
    row = case.kv_heads * case.head_dim * case.dtype.itemsize
    stored = row if case.kv_dtype is None else case.kv_heads * (case.head_dim + 4)
    num_bytes = 2 * tokens * (row + stored)
    layers = copies_beyond_cache(num_bytes, cache_bytes(bench.device))
    torch.manual_seed(0)
    cache = filled_cache(case, bench.device, layers)
    shape = (layers, tokens, case.kv_heads, case.head_dim)
    key, value = (torch.randn(shape, dtype=case.dtype, device=bench.device) for _ in range(2))
    slots = torch.randperm(cache.num_pages * cache.page_size, device=bench.device)[:tokens]
    pages = (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales)
    expected = filled_cache(replace(case), bench.device, 1)
    exact = (expected.key_pages, expected.value_pages, expected.key_scales, expected.value_scales)

    def check(outputs):
        last = (len(outputs) - 1) % layers
        torch.ops.specdec.write_kv(*exact, key[last], value[last], slots, 0, case.kv_dtype, "reference")
        found = [
            (a[last].flatten(0, 1)[slots], b[0].flatten(0, 1)[slots])
            for a, b in zip(pages, exact, strict=True)
            if a is not None
        ]
        return worst(relative_error(a, b.double()) for a, b in found)

    def poison():
        for tensor in pages:
            if tensor is not None:
                tensor.view(torch.uint8).fill_(0x5B)

    def timed(name, call):
        poison()
        # quantised numbers next to a rounding boundary may differ by one step
        tolerance = 0.0 if case.kv_dtype is None else 1e-3
        return measure(name, lambda i: call(i % layers), check, tolerance, bench.clock, max(bench.calls, layers))

    ours = timed("ours", lambda i: write_kv(cache, i, key[i], value[i], slots, impl=bench.impl))
    name = "two index_copy_" if case.kv_dtype is None else "PyTorch: quantise, index_copy_"
    peer = timed(name, lambda i: _plain_write(pages, key[i], value[i], slots, i, case.kv_dtype))
    label = f"{tokens} tokens, {case.kv_dtype or shape_of(case)['dtype']} pages"
    return record(bench, "write", label, ours, [peer], num_bytes, 0, layers=layers)


def _plain_write(pages, key, value, slots, layer, kv_dtype):
    """What a user would write: no look at negative slots, so that a CUDA graph can hold it."""
    for rows, scales, new in zip(pages[:2], pages[2:], (key, value), strict=True):
        target = rows[layer].flatten(0, 1)
        if kv_dtype is None:
            target.index_copy_(0, slots, new)
            continue
        q, scale = quantise(new, kv_dtype)
        target.view(torch.uint8).index_copy_(0, slots, q.view(torch.uint8))
        scales[layer].flatten(0, 1).index_copy_(0, slots, scale)


def _move_rows(bench: Bench, case: Case, layers: int) -> Iterable[dict]:
    cache = filled_cache(case, bench.device, layers)
    row = case.kv_heads * case.head_dim
    sequences, nodes = (2, 6) if bench.size == "toy" else (64, 64)
    starts = torch.arange(sequences, device=bench.device)[:, None] * nodes
    # nodes after those they move to, so that a replay repeats the move
    accepted = torch.tensor([4, 5] if bench.size == "toy" else [9, 17, 33, 50], device=bench.device)
    commit = (starts + accepted).flatten(), (starts + 1 + torch.arange(len(accepted), device=bench.device)).flatten()
    order = torch.randperm(cache.num_pages, device=bench.device)
    copies = min(64, cache.num_pages // 2)
    plans = [
        (f"commit of {len(accepted)} tokens in {sequences} sequences, {layers} layers", row, *commit, len(accepted)),
        (f"copy of {copies} pages of {case.page}, {layers} layers", case.page * row, *order[: 2 * copies].chunk(2), 1),
    ]
    for label, width, sources, targets, segment in plans:
        tensors = [pages.view(layers, -1, width) for pages in (cache.key_pages, cache.value_pages)]
        bounds = torch.arange(0, len(sources) + 1, segment, device=bench.device)
        expected = [t[:, sources].clone() for t in tensors]

        def check(_, tensors=tensors, targets=targets, expected=expected):
            return worst(relative_error(t[:, targets], e.double()) for t, e in zip(tensors, expected, strict=True))

        def timed(name, call, tensors=tensors, targets=targets, check=check):
            for tensor in tensors:
                tensor[:, targets] = float("nan")
            return measure(name, lambda _: call(), check, 0.0, bench.clock, bench.calls)

        ours = timed("ours", lambda t=tensors, a=sources, b=targets, c=bounds: move_rows(t, a, b, c, impl=bench.impl))
        peer = timed("index_select, index_copy_", lambda t=tensors, a=sources, b=targets: _plain_move(t, a, b))
        num_bytes = 4 * layers * len(sources) * width * case.dtype.itemsize  # read and written, keys and values
        yield record(bench, "write", label, ours, [peer], num_bytes, 0, layers=layers)


def _plain_move(tensors, sources, targets):
    for tensor in tensors:
        tensor.index_copy_(1, targets, tensor.index_select(1, sources))
