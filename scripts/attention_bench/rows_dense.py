"""The benchmark's rows of dense prefill, forward and backward, and of a call that mixes chunks and trees."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from attention import paged_attention
from attention.paged.batch import ancestor_bits, build_batch
from scripts.attention_bench import peers as attention_peers
from scripts.attention_bench.bench import TOLERANCE, Bench, bar, best, measure, ratio, record, shape_of, thousands
from scripts.attention_bench.cases import (
    Case,
    Memory,
    depths,
    exact_rows,
    filled_cache,
    random_tree,
    relative_error,
    sampled_error,
    sampled_rows,
    worst,
)
from scripts.common.entry import one_line
from scripts.common.gpu_timing import time_eager, time_on_cpu


def _dense(
    bench: Bench, batch: int, length: int, heads: int, kv_heads: int, dim: int, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, dtype=bench.dtype, device=bench.device).requires_grad_(grad) for shape in shapes)


def _forward_error(case: Case, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Largest relative error over sampled rows of sampled sequences against dense float64 arithmetic."""
    errors = []
    for sequence, rows in sampled_rows(case):
        index = torch.tensor(rows, device=q.device)
        visible = torch.arange(case.context, device=q.device) <= index[:, None]
        expected = exact_rows(q[sequence, index], k[sequence], v[sequence], visible, case.head_dim**-0.5)
        errors.append(relative_error(out[sequence, index], expected))
    return worst(errors)


def _shapes(bench: Bench, lengths: tuple[int, ...]) -> Iterable[tuple[Case, str]]:
    """Sequences of S tokens, 16k tokens in all."""
    small = dict(heads=4, kv_heads=2, head_dim=64) if bench.size == "toy" else {}
    for length in {"full": lengths, "quick": (4096,), "toy": (40,)}[bench.size]:
        batch = max(1, 16384 // length) if bench.size != "toy" else 2
        yield Case("prefill", batch, length, length, dtype=bench.dtype, **small), f"S {thousands(length)}, B {batch}"


def prefill_rows(bench: Bench) -> Iterable[dict]:
    """Flash attention over dense causal batches: forward (our kernel, then what the dispatcher picks) and backward."""
    from attention.flash.api import flash_attention, flash_implementation

    for case, label in _shapes(bench, (1024, 4096, 16384)):
        q, k, v = _dense(bench, case.batch, case.context, case.heads, case.kv_heads, case.head_dim)
        num_bytes, flops = 2 * (q.numel() + k.numel()) * q.element_size(), case.batch * _causal_flops(case)

        def check(outputs, case=case, q=q, k=k, v=v):
            return _forward_error(case, q, k, v, outputs[-1])

        def timed(name, call, check=check):
            return measure(name, lambda _: call(), check, TOLERANCE[bench.dtype], bench.clock, bench.calls)

        peers = []
        for name in bench.present(attention_peers.DENSE):
            if name == "FlexAttention" and case.context != 4096:
                continue  # each shape costs it a compilation
            peers.append(timed(name, attention_peers.DENSE[name](q, k, v)))
        kernel = bench.impl or ("triton" if bench.device.type == "cuda" else "reference")
        ours = timed("ours", lambda q=q, k=k, v=v, kernel=kernel: flash_attention(q, k, v, causal=True, impl=kernel))
        wanted = (
            [bar("SDPA flash's time over ours", ratio(best(peers, "SDPA flash"), ours), 1.15, at_most=False)]
            if case.context >= 4096
            else []
        )
        yield record(
            bench, "prefill", f"forward, {label}, {kernel}", ours, peers, num_bytes, flops, wanted, shape=shape_of(case)
        )

        picked = timed("ours", lambda q=q, k=k, v=v: flash_attention(q, k, v, causal=True, impl=bench.impl))
        chosen = flash_implementation(q, k, v) if bench.impl is None else bench.impl
        wanted = [bar("time over the fastest of all", ratio(picked, best([*peers, ours, picked])), 1.1)]
        if case.context >= 4096:
            wanted.append(
                bar("SDPA flash's time over ours", ratio(best(peers, "SDPA flash"), picked), 1.15, at_most=False)
            )
        yield record(
            bench,
            "prefill",
            f"forward, {label}, dispatcher: {chosen}",
            picked,
            peers,
            num_bytes,
            flops,
            wanted,
            shape=shape_of(case),
        )
    for case, label in _shapes(bench, (4096, 16384)):
        yield _backward_row(bench, case, label, flash_attention)


def _causal_flops(case: Case) -> int:
    return 4 * case.heads * case.head_dim * case.context * (case.context + 1) // 2


def _backward_row(bench: Bench, case: Case, label: str, flash_attention: Callable) -> dict:
    q, k, v = inputs = _dense(bench, case.batch, case.context, case.heads, case.kv_heads, case.head_dim, grad=True)
    upstream = torch.randn_like(q)
    expected = _exact_gradients(case, q, k, v, upstream)

    def check(outputs):
        found = [g[0, :, : r.shape[1]] for g, r in zip(outputs[-1], expected, strict=True)]
        return worst(relative_error(f, e) for f, e in zip(found, expected, strict=True))

    def timed(name, forward):
        try:
            out = forward()
        except Exception as error:
            return {"name": name, "failed": one_line(error)}
        backward = lambda _: torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        return measure(
            name,
            backward,
            check,
            2 * TOLERANCE[bench.dtype],
            time_eager if bench.device.type == "cuda" else time_on_cpu,
            bench.calls,
        )

    kernel = bench.impl or ("triton" if bench.device.type == "cuda" else "reference")
    peers = [timed(name, attention_peers.DENSE[name](q, k, v)) for name in bench.present(("SDPA flash", "SDPA cuDNN"))]
    ours = timed("ours", lambda: flash_attention(q, k, v, causal=True, impl=kernel))
    wanted = [bar("time over SDPA flash's", ratio(ours, best(peers, "SDPA flash")), 1.2)]
    num_bytes = (4 * q.numel() + 4 * k.numel()) * q.element_size()  # q, out, dout, dq and k, v, dk, dv
    flops = 5 * case.batch * _causal_flops(case) // 2  # five products, the forward has two
    return record(
        bench, "prefill", f"backward, {label}, {kernel}", ours, peers, num_bytes, flops, wanted, shape=shape_of(case)
    )


def _exact_gradients(case: Case, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> list[Tensor]:
    """Gradients of the first sequence's first kv head `[S, heads, D]`, in float64; in float32 beyond 4096 tokens."""
    group = case.heads // case.kv_heads
    dtype = torch.float64 if case.context <= 4096 else torch.float32
    leaves = [x[0, :, :n].detach().to(dtype).requires_grad_() for x, n in ((q, group), (k, 1), (v, 1))]
    scores = torch.einsum("qhd,kd->hqk", leaves[0], leaves[1][:, 0]) * case.head_dim**-0.5
    future = torch.ones(case.context, case.context, dtype=torch.bool, device=q.device).triu(1)
    out = torch.einsum("hqk,kd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), leaves[2][:, 0])
    return [g.double() for g in torch.autograd.grad(out, leaves, upstream[0, :, :group].to(dtype))]


def mixed_rows(bench: Bench) -> Iterable[dict]:
    """2 prefill chunks of 512 tokens and 30 trees of 32 nodes in one call, against one call for each kind."""
    toy = bench.size == "toy"
    context, chunk, nodes, counts = (70, 20, 5, (1, 2)) if toy else (4096, 512, 32, (2, 30))
    small = dict(heads=4, kv_heads=2, head_dim=64) if toy else {}
    chunks = Case("mixed", counts[0], context, chunk, dtype=bench.dtype, **small)
    trees = replace(chunks, batch=counts[1], queries=nodes, parents=random_tree(nodes))
    torch.manual_seed(0)
    cache = filled_cache(replace(chunks, batch=sum(counts)), bench.device, 1)
    sequences = [cache.add() for _ in range(sum(counts))]
    cache.append(sequences, [context] * len(sequences))
    tree = (depths(trees.parents), ancestor_bits(trees.parents))
    lengths, plans = [chunk] * counts[0] + [nodes] * counts[1], [None] * counts[0] + [tree] * counts[1]
    together = build_batch(cache, sequences, lengths, trees=plans)
    cut, tokens = counts[0], counts[0] * chunk
    query = torch.randn(sum(lengths), chunks.heads, chunks.head_dim, dtype=bench.dtype, device=bench.device)
    parts = [
        Memory(chunks, cache, build_batch(cache, sequences[:cut], lengths[:cut]), [query[:tokens]], None),
        Memory(
            trees, cache, build_batch(cache, sequences[cut:], lengths[cut:], trees=plans[cut:]), [query[tokens:]], None
        ),
    ]

    def check(outputs):
        pieces = (outputs[-1][:tokens], outputs[-1][tokens:]) if isinstance(outputs[-1], Tensor) else outputs[-1]
        errors = [
            sampled_error(part, piece, 0, part.batch.block_tables, part.case.page)
            for part, piece in zip(parts, pieces, strict=True)
        ]
        return worst(errors)

    def attend(query, batch):
        return paged_attention(query, 0, batch, parts[0].scale, impl=bench.impl)

    settings = (check, TOLERANCE[bench.dtype], bench.clock, bench.calls)
    ours = measure("ours", lambda _: attend(query, together), *settings, page=chunks.page)
    apart = measure(
        "ours, two calls", lambda _: tuple(attend(p.queries[0], p.batch) for p in parts), *settings, page=chunks.page
    )
    limit = sum(bench.limit(part.case.bytes, part.case.flops) for part in parts)
    allowed = max(1.25 * limit, 1.1 * apart.get("seconds", 0))
    wanted = [bar("time over the larger of 1.25 x the parts' limits and 1.1 x two calls", ratio(ours, allowed), 1.0)]
    label = f"{counts[0]} chunks of {chunk}, {counts[1]} trees of {nodes}, context {thousands(context)}"
    num_bytes, flops = (sum(getattr(part.case, name) for part in parts) for name in ("bytes", "flops"))
    yield record(
        bench,
        "mixed",
        label,
        ours,
        [apart],
        num_bytes,
        flops,
        wanted,
        shapes=[shape_of(part.case) for part in parts],
        sum_of_limits_seconds=limit,
    )
