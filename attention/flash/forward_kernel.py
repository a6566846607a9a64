"""Flash attention, forward: exact attention that never writes the S x S scores to memory.

One program owns BLOCK_M queries of one head and walks over key tiles of BLOCK_N. With x = q k^T it keeps per query the
running maximum m, the running sum l and the unnormalised output acc, all in base 2 (Dao 2023, FlashAttention-2,
Algorithm 1; Milakov & Gimelshein 2018):

    s   = log2(e) * scale * x                      or  log2(e) * cap * tanh(scale * x / cap)  with a soft-cap
    m'  = max(m, rowmax s),   p = exp2(s - m'),   a = exp2(m - m')
    l   = a l + rowsum p,     acc = a acc + p v
    out = acc / l,            lse = (m + log2 l) / log2(e)

Tiles in which every query sees every key are in a loop of their own without any mask; only the causal diagonal, the
window's edge and the end of the sequence pay for masks. Queries are right-aligned: query i of n is at position i +
(keys - n). Programs start with the last queries, which see the most keys, so that the short ones fill the gaps at the
end.

The grid is (sequences * heads, tiles of the longest sequence): it depends on no device data, so CUDA graphs can replay
a launch."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)


class FlashConfig(NamedTuple):
    """Tile sizes and launch parameters of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def flash_config(head_dim: int, dtype: torch.dtype) -> FlashConfig:
    """The forward kernel's launch parameters.

    Measured on an H200 (bf16, D 128, causal, S 4k and 16k): 429 and 489 TFLOP/s, against 413 and 459 with key tiles of
    64. Loading tiles through tensor-map descriptors (TMA) gave 415 and 478; backward times then differed by less than
    1.5%, except for `flash_dkv_kernel` at 16k (7% shorter), which did not justify a second way to load."""
    if dtype == torch.float32:  # computed outside the matrix units: tiles small enough for the registers
        return FlashConfig(64, 32, 8, 1) if head_dim <= 64 else FlashConfig(32, 32 if head_dim <= 128 else 16, 8, 1)
    # a warp group of Hopper's matrix unit takes 64 rows, so 128 rows go with 8 warps; three stages at least, since
    # with two a tile is loaded only after the one before it is finished
    return FlashConfig(128, 128, 8, 3) if head_dim <= 128 else FlashConfig(128, 32, 8, 4)


@triton.jit
def sequence_rows(cu_seqlens, index, length, VARLEN: tl.constexpr):
    """(first packed row, number of rows) of sequence `index`; a dense batch has `length` rows each."""
    if VARLEN:
        first = tl.load(cu_seqlens + index).to(tl.int64)
        return first, (tl.load(cu_seqlens + index + 1).to(tl.int64) - first).to(tl.int32)
    else:
        return index.to(tl.int64) * length, length


@triton.jit
def sequence_start(source, index, head, first, stride_b, stride_t, stride_h, VARLEN: tl.constexpr):
    """Pointer to the first row of one head of one sequence: row `first` of a packed batch, or entry `index`."""
    if VARLEN:
        return source + first * stride_t + head * tl.cast(stride_h, tl.int64)
    else:
        return source + index.to(tl.int64) * stride_b + head * tl.cast(stride_h, tl.int64)


@triton.jit
def load_rows(
    source, row, limit, stride_t, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """[BLOCK, BLOCK_D]: rows `row` … of `source`, zero beyond column D; MASKED: zero from row `limit` on too."""
    rows = row + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    pointers = source + tl.cast(row, tl.int64) * stride_t + (tl.arange(0, BLOCK)[:, None] * stride_t + dims[None, :])
    if MASKED:
        tile = tl.load(pointers, mask=(rows[:, None] < limit) & (dims[None, :] < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(pointers, mask=dims[None, :] < D, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(target, tile, row, limit, stride_t, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows of `tile` below `limit`; `target` points to row 0."""
    rows = row + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    pointers = target + rows.to(tl.int64)[:, None] * stride_t + dims[None, :]
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=(rows[:, None] < limit) & (dims[None, :] < D))


@triton.jit
def edges_and_middle(lo, a, b, hi, BLOCK: tl.constexpr):
    """Divide [lo, hi) into tiles with a mask and those of [a, b), which need none.

    Returns (tiles before a, lo, b, number of tiles with a mask, a, number of tiles without)."""
    left = tl.maximum(a - lo, 0) // BLOCK
    return left, lo, b, left + tl.cdiv(tl.maximum(hi - b, 0), BLOCK), a, tl.maximum(b - a, 0) // BLOCK


@triton.jit
def edge_tile(j, left, lo, b, BLOCK: tl.constexpr):
    """First row of tile `j` of those with a mask: the ones before the middle come first."""
    return tl.where(j < left, lo + j * BLOCK, b + (j - left) * BLOCK)


@triton.jit
def key_tiles(first, last, shift, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """`edges_and_middle` of the key tiles that queries `first` … `last - 1` see; all see all of the middle."""
    hi = keys
    seen_by_all = keys
    if CAUSAL:
        hi = tl.minimum(hi, last + shift)
        seen_by_all = tl.maximum(tl.minimum(keys, first + shift + 1), 0)
    lo = 0
    a = 0
    if WINDOW:
        lo = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        a = tl.cdiv(tl.maximum(last + shift - window, 0), BLOCK_N) * BLOCK_N
        a = tl.minimum(a, tl.cdiv(tl.maximum(hi, 0), BLOCK_N) * BLOCK_N)
    return edges_and_middle(lo, a, tl.maximum(a, seen_by_all // BLOCK_N * BLOCK_N), hi, BLOCK_N)


@triton.jit
def visible(position, key, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at `position` sees `key`, for any two shapes that broadcast."""
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= position)
    if WINDOW:
        seen = seen & (position - key < window)
    return seen


@triton.jit
def tanh(x):
    """Hyperbolic tangent, absolute error about 1e-7: Triton's language has none."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))


@triton.jit
def _fold_keys(acc, m, total, q, k, v, tiles, left, lo, b, positions, keys, window, inner, outer, stride_kt, stride_vt,
               D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
               WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add `tiles` key tiles to (acc, m, total): those with a mask if MASKED, else consecutive ones from `lo` on."""
    for j in range(tiles):
        n = edge_tile(j, left, lo, b, BLOCK_N) if MASKED else lo + j * BLOCK_N
        k_tile = load_rows(k, n, keys, stride_kt, D, BLOCK_N, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if SOFTCAP:
            s = tanh(s * inner)
        if MASKED:
            seen = visible(positions[:, None], (n + tl.arange(0, BLOCK_N))[None, :], keys, window, CAUSAL, WINDOW)
            s = tl.where(seen, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1) * outer)
        shift = new_m
        if MASKED:  # a query that has seen nothing yet keeps m = -inf
            shift = tl.where(new_m > float("-inf"), new_m, 0.0)
        p = tl.exp2(s * outer - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v_tile = load_rows(v, n, keys, stride_vt, D, BLOCK_N, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        m = new_m
    return acc, m, total


@triton.jit(do_not_specialize=["length_q", "length_k", "rows", "window"])
def flash_forward_kernel(q, k, v, out, lse, cu_q, cu_k, length_q, length_k, rows, window, inner, outer, stride_qb,
                         stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                         HEADS: tl.constexpr, GROUP_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                         SOFTCAP: tl.constexpr, VARLEN: tl.constexpr):  # fmt: skip
    """`out [rows, HEADS, D]` and `lse [HEADS, rows]` are contiguous; `inner` and `outer` as in `score_factors`."""
    index = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    group = head // GROUP_SIZE
    first_query, queries = sequence_rows(cu_q, index, length_q, VARLEN)
    first_key, keys = sequence_rows(cu_k, index, length_k, VARLEN)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    if start >= queries:
        return
    shift = keys - queries
    positions = start + tl.arange(0, BLOCK_M) + shift

    q = sequence_start(q, index, head, first_query, stride_qb, stride_qt, stride_qh, VARLEN)
    k = sequence_start(k, index, group, first_key, stride_kb, stride_kt, stride_kh, VARLEN)
    v = sequence_start(v, index, group, first_key, stride_vb, stride_vt, stride_vh, VARLEN)
    q_tile = load_rows(q, start, queries, stride_qt, D, BLOCK_M, BLOCK_D, True)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    last = tl.minimum(start + BLOCK_M, queries)
    left, lo, b, edges, a, middle = key_tiles(start, last, shift, keys, window, CAUSAL, WINDOW, BLOCK_N)
    acc, m, total = _fold_keys(
        acc, m, total, q_tile, k, v, middle, 0, a, 0, positions, keys, window, inner, outer, stride_kt, stride_vt, D,
        BLOCK_N, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, False,
    )  # fmt: skip
    acc, m, total = _fold_keys(
        acc, m, total, q_tile, k, v, edges, left, lo, b, positions, keys, window, inner, outer, stride_kt, stride_vt, D,
        BLOCK_N, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, True,
    )  # fmt: skip

    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    log_sum = tl.where(some, (m + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    query = start + tl.arange(0, BLOCK_M)
    tl.store(lse + head.to(tl.int64) * rows + first_query + query, log_sum, mask=query < queries)
    store_rows(out + (first_query * HEADS + head) * D, acc, start, queries, HEADS * D, D, BLOCK_M, BLOCK_D)


def batched(tensor: Tensor) -> Tensor:
    """`[T, H, D]` as `[1, T, H, D]`, `[B, S, H, D]` as it is; copied only if the last dimension is not contiguous."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor if tensor.ndim == 4 else tensor[None]


def padded(head_dim: int) -> int:
    """BLOCK_D: a power of two, 16 at least, as a matrix product needs."""
    return max(16, triton.next_power_of_2(head_dim))


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(inner, outer): scores in base 2 are outer * x, or outer * tanh(inner * x) with a soft-cap."""
    return (0.0, scale * LOG2E) if softcap is None else (scale / softcap, softcap * LOG2E)


def constants(config: FlashConfig, heads: int, groups: int, head_dim: int, causal: bool, window: int | None,
              softcap: float | None, packed: bool) -> dict:  # fmt: skip
    """The compile-time arguments and launch options that the forward and backward kernels share."""
    return dict(
        HEADS=heads, GROUP_SIZE=heads // groups, D=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=padded(head_dim), CAUSAL=causal, WINDOW=window is not None, SOFTCAP=softcap is not None,
        VARLEN=packed, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def flash_forward(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
                  max_seqlen_q: int, causal: bool, scale: float, window: int | None, softcap: float | None,
                  config: FlashConfig | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`query [B, S, H, D]`, or packed `[T, H, D]` with cu_seqlens, -> `(out like query, lse [H, B * S or T])`.

    Arguments are not checked."""
    q, k, v = (batched(x) for x in (query, key, value))
    heads, groups, head_dim = q.shape[2], k.shape[2], q.shape[3]
    rows = q.shape[0] * q.shape[1]
    config = config or flash_config(head_dim, query.dtype)
    out, sequences = query.new_empty(query.shape), q.shape[0]
    lse = query.new_empty(heads, rows, dtype=torch.float32)
    if cu_seqlens_q is not None:
        sequences = cu_seqlens_q.shape[0] - 1
        out.zero_()  # no program owns rows after the last sequence
        lse.fill_(float("-inf"))
    grid = (sequences * heads, triton.cdiv(max_seqlen_q, config.block_m))
    if 0 in grid:
        return out, lse
    flash_forward_kernel[grid](
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1], rows, window or 0,
        *score_factors(scale, softcap), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **constants(config, heads, groups, head_dim, causal, window, softcap, cu_seqlens_q is not None),
    )  # fmt: skip
    return out, lse
