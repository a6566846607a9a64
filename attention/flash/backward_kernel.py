"""Flash attention, backward: gradients from the saved log-sum-exp, recomputing the scores tile by tile.

With p = exp(s - lse), delta_i = <dout_i, out_i> - dlse_i and t = tanh(scale x / cap) where there is a soft-cap (Dao
2023, Algorithm 2):

    dp = dout v^T,   ds = p * (dp - delta),   dx = scale * ds * (1 - t^2)
    dv = p^T dout,   dq = dx k,               dk = dx^T q

Two kernels: `flash_dq_kernel` owns BLOCK_M queries of a head and walks over keys (it also stores delta for the other
one); `flash_dkv_kernel` owns BLOCK_N keys of a kv head and walks over the queries of all heads of its group.

This backward is deterministic by construction: one program adds up the terms of each gradient, in an order that depends
on the lengths alone, without atomics. Equal inputs give bitwise equal gradients; there is no other mode. The price is
that scores are computed twice. Rows of a tile beyond the end of the sequence have p = 0 through lse = +inf or a mask,
or are never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.flash.forward_kernel import (
    FlashConfig,
    batched,
    constants,
    edge_tile,
    edges_and_middle,
    key_tiles,
    load_rows,
    score_factors,
    sequence_rows,
    sequence_start,
    store_rows,
    tanh,
    visible,
)


def dq_config(head_dim: int, dtype: torch.dtype) -> FlashConfig:
    """Launch parameters of `flash_dq_kernel`."""
    if dtype == torch.float32:
        return FlashConfig(32, 32, 8, 1) if head_dim <= 64 else FlashConfig(32 if head_dim <= 128 else 16, 16, 8, 1)
    return FlashConfig(128, 64 if head_dim <= 128 else 32, 8, 3)


def dkv_config(head_dim: int, dtype: torch.dtype, softcap: bool) -> FlashConfig:
    """Launch parameters of `flash_dkv_kernel`.

    Two accumulators of BLOCK_N rows leave few registers, and a soft-cap's derivative needs some."""
    if dtype == torch.float32:
        return FlashConfig(32, 32, 8, 1) if head_dim <= 64 else FlashConfig(16, 32 if head_dim <= 128 else 16, 8, 1)
    if head_dim > 128:
        return FlashConfig(32, 64, 8, 3)
    return FlashConfig(32 if softcap and head_dim > 64 else 64, 128, 8, 3)


@triton.jit
def _dq_tiles(dq, q, dout, lse, delta, k, v, tiles, left, lo, b, positions, keys, window, inner, outer, stride_kt,
              stride_vt,
              D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
              SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add `tiles` key tiles to `dq`, without the factor scale; which tiles: as in `_fold_keys` of the forward."""
    for j in range(tiles):
        n = edge_tile(j, left, lo, b, BLOCK_N) if MASKED else lo + j * BLOCK_N
        k_tile = load_rows(k, n, keys, stride_kt, D, BLOCK_N, BLOCK_D, MASKED)
        v_tile = load_rows(v, n, keys, stride_vt, D, BLOCK_N, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
        if SOFTCAP:
            s = tanh(s * inner)
        p = tl.exp2(s * outer - lse[:, None])
        if MASKED:
            seen = visible(positions[:, None], (n + tl.arange(0, BLOCK_N))[None, :], keys, window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["length_q", "length_k", "rows", "window"])
def flash_dq_kernel(q, k, v, out, dout, lse, dlse, delta, dq, cu_q, cu_k, length_q, length_k, rows, window, scale,
                    inner, outer, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb,
                    stride_vt, stride_vh, stride_db, stride_dt, stride_dh,
                    HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                    SOFTCAP: tl.constexpr, VARLEN: tl.constexpr):  # fmt: skip
    """`out`, `dq [rows, HEADS, D]` and `lse`, `dlse`, `delta [HEADS, rows]` are contiguous; `dlse` may be None."""
    index = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    group = head // GROUP_SIZE
    first_query, queries = sequence_rows(cu_q, index, length_q, VARLEN)
    first_key, keys = sequence_rows(cu_k, index, length_k, VARLEN)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    if start >= queries:
        return
    shift = keys - queries
    query = start + tl.arange(0, BLOCK_M)
    packed = head.to(tl.int64) * rows + first_query + query
    target = (first_query * HEADS + head) * D

    q = sequence_start(q, index, head, first_query, stride_qb, stride_qt, stride_qh, VARLEN)
    dout = sequence_start(dout, index, head, first_query, stride_db, stride_dt, stride_dh, VARLEN)
    k = sequence_start(k, index, group, first_key, stride_kb, stride_kt, stride_kh, VARLEN)
    v = sequence_start(v, index, group, first_key, stride_vb, stride_vt, stride_vh, VARLEN)
    dout_tile = load_rows(dout, start, queries, stride_dt, D, BLOCK_M, BLOCK_D, True)
    out_tile = load_rows(out + target, start, queries, HEADS * D, D, BLOCK_M, BLOCK_D, True)
    delta_tile = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        delta_tile -= tl.load(dlse + packed, mask=query < queries, other=0.0)
    tl.store(delta + packed, delta_tile, mask=query < queries)
    q_tile = load_rows(q, start, queries, stride_qt, D, BLOCK_M, BLOCK_D, True)
    lse_tile = tl.load(lse + packed, mask=query < queries, other=float("inf")) * 1.4426950408889634
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    last = tl.minimum(start + BLOCK_M, queries)
    left, lo, b, edges, a, middle = key_tiles(start, last, shift, keys, window, CAUSAL, WINDOW, BLOCK_N)
    grad = _dq_tiles(
        grad, q_tile, dout_tile, lse_tile, delta_tile, k, v, middle, 0, a, 0, query + shift, keys, window, inner, outer,
        stride_kt, stride_vt, D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, False,
    )  # fmt: skip
    grad = _dq_tiles(
        grad, q_tile, dout_tile, lse_tile, delta_tile, k, v, edges, left, lo, b, query + shift, keys, window, inner,
        outer, stride_kt, stride_vt, D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, True,
    )  # fmt: skip
    store_rows(dq + target, grad * scale, start, queries, HEADS * D, D, BLOCK_M, BLOCK_D)


@triton.jit
def query_tiles(first, last, shift, queries, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr):
    """`edges_and_middle` of the query tiles that see keys `first` … `last - 1`; in the middle all see all."""
    hi = queries
    sees_all = queries
    if WINDOW:
        hi = tl.maximum(tl.minimum(hi, last - 1 + window - shift), 0)
        sees_all = tl.maximum(tl.minimum(queries, first + window - shift), 0)
    lo = 0
    a = 0
    if CAUSAL:
        lo = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        a = tl.cdiv(tl.maximum(last - 1 - shift, 0), BLOCK_M) * BLOCK_M
        a = tl.minimum(a, tl.cdiv(hi, BLOCK_M) * BLOCK_M)
    return edges_and_middle(lo, a, tl.maximum(a, sees_all // BLOCK_M * BLOCK_M), hi, BLOCK_M)


@triton.jit
def _dkv_tiles(dk, dv, k, v, q, dout, lse, delta, tiles, left, lo, b, key, shift, queries, keys, rows, window, inner,
               outer, stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh, index, group, first_query,
               GROUP_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, VARLEN: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """Add `tiles` query tiles of each head of the group to `dk`, without the factor scale, and `dv`.

    Scores are keys x queries here."""
    # float32: one long sum over all heads would round more than PyTorch's sum of heads does
    BY_HEAD: tl.constexpr = k.dtype == tl.float32
    if BY_HEAD:
        dk_before = tl.zeros_like(dk)
        dv_before = tl.zeros_like(dv)
    # the compiler assumes that no division is by zero, even one that never runs, and would drop the loads' bounds
    some = tl.maximum(tiles, 1)
    # one loop over heads and tiles: it is pipelined across heads, and nested loops spill registers
    for step in range(tiles * GROUP_SIZE):
        head = group * GROUP_SIZE + step // some
        j = step % some
        if BY_HEAD:
            if j == 0:
                dk_before += dk
                dv_before += dv
                dk = tl.zeros_like(dk)
                dv = tl.zeros_like(dv)
        i = edge_tile(j, left, lo, b, BLOCK_M) if MASKED else lo + j * BLOCK_M
        query = i + tl.arange(0, BLOCK_M)
        q_head = sequence_start(q, index, head, first_query, stride_qb, stride_qt, stride_qh, VARLEN)
        dout_head = sequence_start(dout, index, head, first_query, stride_db, stride_dt, stride_dh, VARLEN)
        packed = head.to(tl.int64) * rows + first_query
        q_tile = load_rows(q_head, i, queries, stride_qt, D, BLOCK_M, BLOCK_D, MASKED)
        dout_tile = load_rows(dout_head, i, queries, stride_dt, D, BLOCK_M, BLOCK_D, MASKED)
        if MASKED:
            lse_tile = tl.load(lse + packed + query, mask=query < queries, other=float("inf")) * 1.4426950408889634
            delta_tile = tl.load(delta + packed + query, mask=query < queries, other=0.0)
        else:
            lse_tile = tl.load(lse + packed + query) * 1.4426950408889634
            delta_tile = tl.load(delta + packed + query)
        s = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        if SOFTCAP:
            s = tanh(s * inner)
        p = tl.exp2(s * outer - lse_tile[None, :])
        if MASKED:
            p = tl.where(visible(query[None, :] + shift, key[:, None], keys, window, CAUSAL, WINDOW), p, 0.0)
        dv = tl.dot(p.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout_tile), input_precision="ieee")
        ds = p * (dp - delta_tile[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    if BY_HEAD:
        dk += dk_before
        dv += dv_before
    return dk, dv


@triton.jit(do_not_specialize=["length_q", "length_k", "rows", "window"])
def flash_dkv_kernel(q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, length_q, length_k, rows, window, scale, inner,
                     outer, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt,
                     stride_vh, stride_db, stride_dt, stride_dh,
                     HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                     SOFTCAP: tl.constexpr, VARLEN: tl.constexpr):  # fmt: skip
    """`dk`, `dv [keys of all sequences, kv heads, D]` and `lse`, `delta [HEADS, rows]` are contiguous."""
    GROUPS: tl.constexpr = HEADS // GROUP_SIZE
    index = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    first_query, queries = sequence_rows(cu_q, index, length_q, VARLEN)
    first_key, keys = sequence_rows(cu_k, index, length_k, VARLEN)
    start = tl.program_id(1) * BLOCK_N
    if start >= keys:
        return
    shift = keys - queries
    key = start + tl.arange(0, BLOCK_N)
    k = sequence_start(k, index, group, first_key, stride_kb, stride_kt, stride_kh, VARLEN)
    v = sequence_start(v, index, group, first_key, stride_vb, stride_vt, stride_vh, VARLEN)
    k_tile = load_rows(k, start, keys, stride_kt, D, BLOCK_N, BLOCK_D, True)
    v_tile = load_rows(v, start, keys, stride_vt, D, BLOCK_N, BLOCK_D, True)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    last = tl.minimum(start + BLOCK_N, keys)
    left, lo, b, edges, a, middle = query_tiles(start, last, shift, queries, window, CAUSAL, WINDOW, BLOCK_M)
    dk_tile, dv_tile = _dkv_tiles(
        dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, middle, 0, a, 0, key, shift, queries, keys, rows, window,
        inner, outer, stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh, index, group, first_query,
        GROUP_SIZE, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, VARLEN, False,
    )  # fmt: skip
    dk_tile, dv_tile = _dkv_tiles(
        dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, edges, left, lo, b, key, shift, queries, keys, rows,
        window, inner, outer, stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh, index, group,
        first_query, GROUP_SIZE, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, VARLEN, True,
    )  # fmt: skip
    target = (first_key * GROUPS + group) * D
    store_rows(dk + target, dk_tile * scale, start, keys, GROUPS * D, D, BLOCK_N, BLOCK_D)
    store_rows(dv + target, dv_tile, start, keys, GROUPS * D, D, BLOCK_N, BLOCK_D)


def flash_backward(grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
                   lse: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
                   max_seqlen_k: int, causal: bool, scale: float, window: int | None, softcap: float | None,
                   dq_launch: FlashConfig | None = None,
                   dkv_launch: FlashConfig | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value from those of `flash_forward`'s `out` and `lse`.

    Arguments are not checked."""
    q, k, v, dout = (batched(x) for x in (query, key, value, grad_out))
    heads, groups, head_dim = q.shape[2], k.shape[2], q.shape[3]
    packed = cu_seqlens_q is not None
    # rows after the last packed sequence are zero
    dq, dk, dv = (x.new_zeros(x.shape) if packed else x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    common = (
        cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1], q.shape[0] * q.shape[1], window or 0, scale,
        *score_factors(scale, softcap),
    )  # fmt: skip
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]

    shared = heads, groups, head_dim, causal, window, softcap, packed
    config = dq_launch or dq_config(head_dim, query.dtype)
    grid = (sequences * heads, triton.cdiv(max_seqlen_q, config.block_m))
    if 0 not in grid:
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        flash_dq_kernel[grid](
            q, k, v, out, dout, lse, grad_lse, delta, dq, *common, *strides, **constants(config, *shared)
        )
    config = dkv_launch or dkv_config(head_dim, query.dtype, softcap is not None)
    grid = (sequences * groups, triton.cdiv(max_seqlen_k, config.block_n))
    if 0 not in grid:
        flash_dkv_kernel[grid](q, k, v, dout, lse, delta, dk, dv, *common, *strides, **constants(config, *shared))
    return dq, dk, dv
