"""Paged attention in Triton: split-KV flash attention over pages, with tree masks, GQA packing and quantised keys and values.

One program holds a tile of BLOCK_M rows: BLOCK_M // R tokens of one sequence times the R = H / G query heads of one kv group, so a
key is read once for all of them. It walks a range of the sequence's keys in tiles of BLOCK_N with an online softmax (Milakov and
Gimelshein 2018; Dao et al. 2022), scores in units of log2:

    s = scale * log2(e) * <q, k>      m' = max(m, max s)      p = 2^(s - m')
    total = total * 2^(m - m') + sum p        acc = acc * 2^(m - m') + p v

Keys in the prefix that every row of the tile sees are walked without a mask. Only the tiles behind it look at causality, the sliding
window and the tree: bit n of a node's ancestor words says whether it sees node n.

Quantised pages: q . (k_scale k) = k_scale (q . k), and p (v_scale v) = (p v_scale) v, so scales touch rows of scores, never tiles of keys.

Split-KV (Dao et al. 2023, Flash-Decoding), for every query length: the sum over sequences of (query tiles x key tiles) is divided by
the programs that fill the chip, which gives the key tiles per program; a sequence longer than that is split. Every program works this
plan out from the lengths on the device, so the grid depends on shapes alone and a CUDA graph may replay it with other lengths. Parts of
split tiles go to scratch memory as (out, log-sum-exp) and a second kernel joins them:  out = sum_i 2^(lse_i - lse) out_i.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BATCH_TENSORS = ["tables", "kv_lengths", "cu_seqlens_q", "positions", "tree_bits", "tree_sizes"]


class PagedConfig(NamedTuple):
    """Tile sizes and launch options; `programs_per_sm` is what the plan counts on running at once, `max_registers` makes room for them."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None


def paged_config(rows: int, head_dim: int, element_size: int, page_size: int) -> PagedConfig:
    """The configuration for tiles of up to `rows` = query tokens x heads of a group, measured on an H200."""
    wide = head_dim > 128
    if element_size == 4:  # exact float32 products run outside the matrix units
        return PagedConfig(16, 32 if not wide else 16, 4, 1, 2)
    if rows <= 16:
        if wide:
            return PagedConfig(16, 32, 4, 4, 1)
        return PagedConfig(16, 128, 4, 3, 1) if page_size % 128 == 0 else PagedConfig(16, 64, 4, 4, 1)
    if rows <= 32:
        return PagedConfig(32, 64, 4, 3, 1) if not wide else PagedConfig(32, 32, 4, 4, 1)
    if rows <= 64:
        return PagedConfig(64, 64, 4, 3, 2) if not wide else PagedConfig(64, 32, 4, 3, 1)
    if wide:
        return PagedConfig(128, 32, 8, 3, 1)
    # many tiles of one sequence find its keys in the level-2 cache, and two programs a processor then hide each other's softmax
    return PagedConfig(128, 64, 8, 3, 1) if rows <= 256 else PagedConfig(64, 64, 4, 3, 2)


@triton.jit
def _plan(kv_lengths, cu_seqlens_q, B, programs, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
          B_PAD: tl.constexpr):  # fmt: skip
    """Per sequence [B_PAD]: query tiles and into how many parts the keys of each are split."""
    row = tl.arange(0, B_PAD)
    length = tl.load(kv_lengths + row, mask=row < B, other=0).to(tl.int32)
    new = (tl.load(cu_seqlens_q + row + 1, mask=row < B, other=0) - tl.load(cu_seqlens_q + row, mask=row < B, other=0)).to(tl.int32)
    query_tiles = tl.cdiv(new, BLOCK_Q)
    key_tiles = tl.cdiv(length, BLOCK_N) - _first_key(length, new, WINDOW) // BLOCK_N
    per_program = tl.maximum(tl.cdiv(tl.sum(query_tiles * key_tiles, 0), programs), MIN_TILES)
    return query_tiles, tl.cdiv(key_tiles, per_program)


@triton.jit
def _first_key(length, new, WINDOW: tl.constexpr):
    """The first key that any of the last `new` tokens sees."""
    first = length * 0
    if WINDOW is not None:
        first = tl.maximum(length - new - WINDOW + 1, 0)
    return first


@triton.jit
def _locate(counts, index, B_PAD: tl.constexpr):
    """Item `index` of a list that holds counts[b] items of each sequence b -> (b, which of its items); b >= B behind the end."""
    sequence = tl.sum((tl.cumsum(counts, 0) <= index).to(tl.int32), 0)
    return sequence, index - tl.sum(tl.where(tl.arange(0, B_PAD) < sequence, counts, 0), 0)


@triton.jit
def _pick(values, sequence, B_PAD: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, B_PAD) == sequence, values, 0), 0)


@triton.jit
def _look_up(table, key, end, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the keys key .. key + BLOCK_N - 1: a single one where the tile lies inside a page, else [BLOCK_N]."""
    if P % BLOCK_N == 0:
        pages = tl.load(table + key // P, mask=key < end, other=0)
    else:
        keys = key + tl.arange(0, BLOCK_N)
        pages = tl.load(table + keys // P, mask=keys < end, other=0)
    return pages.to(tl.int64)


@triton.jit
def _load_tile(pages, first, offsets, inside, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N, WIDTH_PAD] of one kv head at slots first + offsets; `pages` points at that head in slot 0."""
    d = tl.arange(0, WIDTH_PAD)
    pointers = pages + first * (GROUPS * WIDTH) + (offsets[:, None] * (GROUPS * WIDTH) + d[None, :])
    if MASKED:
        tile = tl.load(pointers, mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH_PAD != WIDTH:
        tile = tl.load(pointers, mask=(d < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _load_scales(scales, first, offsets, inside, GROUPS: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N], of the kv head that `scales` points at."""
    if MASKED:
        tile = tl.load(scales + first * GROUPS + offsets * GROUPS, mask=inside, other=0.0)
    else:
        tile = tl.load(scales + first * GROUPS + offsets * GROUPS)
    return tile


@triton.jit
def _row_words(bit_rows, node, in_tree, WORDS: tl.constexpr):
    """For each row the 32 bits that say which of the nodes node .. node + 31 it sees; what lies before the tree is seen by all."""
    pair = tl.zeros(in_tree.shape, tl.int64)
    for half in tl.static_range(2):
        index = (node >> 5) + half
        word = tl.load(bit_rows + tl.minimum(tl.maximum(index, 0), WORDS - 1), mask=in_tree, other=-1)
        word = tl.where(index < 0, -1, tl.where(in_tree & (index >= WORDS), 0, word))
        pair |= (word.to(tl.int64) & 0xFFFFFFFF) << (32 * half)
    return (pair >> (node & 31).to(tl.int64)).to(tl.int32)


@triton.jit
def _widen(x, dtype: tl.constexpr):
    """8-bit numbers in `dtype`, exactly."""
    if x.dtype == tl.int8 and dtype == tl.float16:  # bits of 1024 + (x + 128); the chip's own conversion runs at a quarter of the rate
        wide = ((x.to(tl.int16) & 0xFF) ^ 0x6480).to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    else:
        wide = x.to(dtype)
    return wide


@triton.jit
def _bytes(pairs, kind: tl.constexpr, dtype: tl.constexpr):
    """The even and the odd columns of a tile of 8-bit numbers that was read as 16-bit pairs."""
    low = pairs.to(tl.int8).to(kind, bitcast=True)
    high = (pairs >> 8).to(tl.int8).to(kind, bitcast=True)
    return _widen(low, dtype), _widen(high, dtype)


@triton.jit
def _walk(acc, odd, peak, total, m, q, begin, end, k_pages, v_pages, k_scales, v_scales, table, length, scale, softcap,
          index, first_node, bit_rows, position, positions_end,
          G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
          WORDS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, QUANTISED: tl.constexpr, PRECISION: tl.constexpr,
          MASKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Online softmax over the keys begin .. end - 1, both multiples of BLOCK_N. MASKED: some rows do not see some of them.

    Quantised values come as 16-bit pairs of columns, since a product over keys needs pairs of keys and shared memory is read 16 bits wide;
    `acc` then has the even columns and `odd` the odd ones, both in units of `peak`, the largest scale so far: float16 has little range.
    """
    n = tl.arange(0, BLOCK_N)
    limit = tl.minimum(end, length)
    page = _look_up(table, begin, limit, P, BLOCK_N)
    for key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        j = key + n
        inside = j < length
        if P % BLOCK_N == 0:  # one 64-bit address, the rest of the tile at constant distances
            first = page * P + key % P
            offsets = n
        else:
            first = 0
            offsets = page * P + j % P
        page = _look_up(table, key + BLOCK_N, limit, P, BLOCK_N)  # a tile ahead: loads of keys then wait for no lookup
        k = _load_tile(k_pages, first, offsets, inside, G, D, D_PAD, MASKED)
        s = tl.dot(q, tl.trans(_widen(k, q.dtype)), input_precision=PRECISION)
        if QUANTISED:
            s = s * _load_scales(k_scales, first, offsets, inside, G, MASKED)[None, :]
        factor = scale
        if SOFTCAP:  # cap * tanh(x) by way of 2^(2 x log2 e)
            s = softcap * (1 - 2 / (1 + tl.exp2(s * scale)))
            factor = 1.0
        if MASKED:
            visible = j[None, :] <= index[:, None]
            key_position = j
            if WORDS > 0:
                node = j - first_node
                word = tl.zeros([q.shape[0], BLOCK_N], tl.int32)
                for part in tl.static_range((BLOCK_N + 31) // 32):
                    row_word = _row_words(bit_rows, key + 32 * part - first_node, index >= first_node, WORDS)
                    word = tl.where((n // 32 == part)[None, :], row_word[:, None], word)
                visible = visible & (((word >> (n & 31)[None, :]) & 1) == 1)
                if WINDOW is not None:
                    in_tail = (node >= 0) & inside
                    key_position = tl.where(in_tail, tl.load(positions_end - length + j, mask=in_tail, other=0).to(tl.int32), j)
            if WINDOW is not None:
                visible = visible & (position[:, None] - key_position[None, :] < WINDOW)
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        shift = m_new
        if MASKED:
            shift = tl.where(m_new > float("-inf"), m_new, 0.0)
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        if QUANTISED:
            scales = _load_scales(v_scales, first, offsets, inside, G, MASKED)
            pairs = _load_tile(v_pages, first, offsets, inside, G, DV // 2, DV_PAD // 2, MASKED)
            v_even, v_odd = _bytes(pairs, k.dtype, q.dtype)
            larger = tl.maximum(peak, tl.max(scales, 0))
            alpha *= peak / larger
            p = (p * (scales / larger)[None, :]).to(q.dtype)
            acc = tl.dot(p, v_even, acc * alpha[:, None], input_precision=PRECISION)
            odd = tl.dot(p, v_odd, odd * alpha[:, None], input_precision=PRECISION)
            peak = larger
        else:
            acc = acc * alpha[:, None]
            v = _load_tile(v_pages, first, offsets, inside, G, DV, DV_PAD, MASKED)
            acc = tl.dot(p.to(q.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return acc, odd, peak, total, m


# a batch's tensors are views into one, so their alignment varies; without this each alignment and size would be compiled for
@triton.jit(do_not_specialize=["B", "programs", "table_width"], do_not_specialize_on_alignment=BATCH_TENSORS)
def _attention_kernel(query, k_pages, v_pages, k_scales, v_scales, out, lse, part_out, part_lse, tables, kv_lengths, cu_seqlens_q, positions,
                      tree_bits, tree_sizes, sinks, B, programs, table_width, stride_qt, stride_qh, scale, softcap,
                      R: tl.constexpr, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, STAGES: tl.constexpr, MIN_TILES: tl.constexpr,
                      B_PAD: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
                      QUANTISED: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program for each (item, group): a query tile and one part of its keys. See the module's docstring."""
    BLOCK_Q: tl.constexpr = BLOCK_M // R
    group = tl.program_id(0) % G  # neighbours read the same pages
    query_tiles, parts = _plan(kv_lengths, cu_seqlens_q, B, programs, WINDOW, BLOCK_Q, BLOCK_N, MIN_TILES, B_PAD)
    sequence, item = _locate(query_tiles * parts, tl.program_id(0) // G, B_PAD)
    if sequence >= B:
        return
    num_parts = _pick(parts, sequence, B_PAD)
    split_items = tl.where(parts > 1, query_tiles * parts, 0)
    scratch = tl.sum(tl.where(tl.arange(0, B_PAD) < sequence, split_items, 0), 0) + item

    length = tl.load(kv_lengths + sequence).to(tl.int32)
    query_start = tl.load(cu_seqlens_q + sequence)
    query_end = tl.load(cu_seqlens_q + sequence + 1)
    new = (query_end - query_start).to(tl.int32)
    tile = tl.cdiv(new, BLOCK_Q) - 1 - item // num_parts  # the longest causal tiles first
    part = item % num_parts

    # rows: BLOCK_Q tokens x R heads; the rest of the tile computes on zeros and is not stored
    row = tl.arange(0, BLOCK_M)
    token = tile * BLOCK_Q + row // R
    real = (row < BLOCK_Q * R) & (token < new)
    packed = query_start + token
    head = group * R + row % R
    d = tl.arange(0, D_PAD)
    q = tl.load(query + (packed * stride_qt + head * stride_qh)[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    if QUANTISED and q.dtype == tl.bfloat16:  # 8-bit numbers become float16 faster than bfloat16; a power of two brings q into range
        largest = tl.max(tl.max(tl.abs(q.to(tl.float32)), 1), 0)
        unit = tl.exp2(tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0))))
        q = (q.to(tl.float32) / unit).to(tl.float16)
        scale *= unit
    index = tl.where(real, length - new + token, -1)  # of the query in its sequence
    first_node = length
    bit_rows = packed
    if WORDS > 0:
        bit_rows = tree_bits + packed * WORDS
        first_node = length - tl.load(tree_sizes + sequence).to(tl.int32)
    position = index
    if WINDOW is not None and WORDS > 0:
        position = tl.load(positions + packed, mask=real, other=0).to(tl.int32)

    # the tile's own range of keys, cut to this part; [begin, clear) is seen by every row
    first_index = length - new + tile * BLOCK_Q
    lowest = _first_key(length, new, WINDOW) // BLOCK_N * BLOCK_N
    per_part = tl.cdiv(tl.cdiv(length - lowest, BLOCK_N), num_parts) * BLOCK_N
    begin = lowest + part * per_part
    end = tl.minimum(begin + per_part, tl.cdiv(tl.minimum(first_index + BLOCK_Q, length), TAIL_N) * TAIL_N)
    if WINDOW is not None:
        begin = tl.maximum(begin, tl.maximum(tl.minimum(first_index, first_node) - WINDOW + 1, 0) // BLOCK_N * BLOCK_N)
        clear = begin
    else:
        clear = tl.maximum(begin, tl.minimum(end, tl.minimum(first_index + 1, first_node) // BLOCK_N * BLOCK_N))

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    COLUMNS: tl.constexpr = DV_PAD // 2 if QUANTISED else DV_PAD
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    odd = tl.zeros([BLOCK_M, COLUMNS if QUANTISED else 1], tl.float32)
    peak = 1e-30
    k_pages += group * D
    v_pages += group * (DV // 2 if QUANTISED else DV)
    if QUANTISED:
        k_scales += group
        v_scales += group
    table = tables + sequence.to(tl.int64) * table_width
    if WINDOW is None:
        acc, odd, peak, total, m = _walk(
            acc, odd, peak, total, m, q, begin, clear, k_pages, v_pages, k_scales, v_scales, table, length, scale, softcap, index, first_node, bit_rows,
            position, positions + query_end, G, P, D, DV, D_PAD, DV_PAD, BLOCK_N, WORDS, WINDOW, SOFTCAP, QUANTISED, PRECISION, False,
            STAGES)  # fmt: skip
    # smaller tiles here: masks cost registers, and the tail is short
    acc, odd, peak, total, m = _walk(
        acc, odd, peak, total, m, q, clear, end, k_pages, v_pages, k_scales, v_scales, table, length, scale, softcap, index, first_node, bit_rows,
        position, positions + query_end, G, P, D, DV, D_PAD, DV_PAD, TAIL_N, WORDS, WINDOW, SOFTCAP, QUANTISED, PRECISION, True,
        2 if WINDOW is None and STAGES > 1 else STAGES)  # fmt: skip

    if QUANTISED:
        acc = tl.join(acc, odd).reshape(BLOCK_M, DV_PAD) * peak
    dv = tl.arange(0, DV_PAD)
    if num_parts > 1:
        scratch_row = (scratch.to(tl.int64) * G + group) * BLOCK_M + row
        tl.store(part_out + scratch_row[:, None] * DV + dv[None, :], acc / tl.where(total > 0, total, 1.0)[:, None], mask=real[:, None] & (dv < DV)[None, :])
        tl.store(part_lse + scratch_row, m + tl.log2(tl.where(total > 0, total, 1.0)), mask=real)
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            top = tl.maximum(m, sink)
            acc = acc * tl.exp2(m - top)[:, None]
            total = total * tl.exp2(m - top) + tl.exp2(sink - top)
            m = top
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_row = packed * (G * R) + head
        tl.store(out + out_row[:, None] * DV + dv[None, :], result.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
        if LSE:
            tl.store(lse + out_row, (m + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, mask=real)


@triton.jit(do_not_specialize=["B", "programs"], do_not_specialize_on_alignment=BATCH_TENSORS)
def _merge_kernel(out, lse, part_out, part_lse, kv_lengths, cu_seqlens_q, sinks, B, programs,
                  R: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  MIN_TILES: tl.constexpr, B_PAD: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
                  ROWS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Program (rows of a tile, group, split tile): joins the parts of ROWS query tokens and heads, PARTS at a time."""
    BLOCK_Q: tl.constexpr = BLOCK_M // R
    group = tl.program_id(1)
    query_tiles, parts = _plan(kv_lengths, cu_seqlens_q, B, programs, WINDOW, BLOCK_Q, BLOCK_N, MIN_TILES, B_PAD)
    sequence, tile_item = _locate(tl.where(parts > 1, query_tiles, 0), tl.program_id(2), B_PAD)
    if sequence >= B:
        return
    num_parts = _pick(parts, sequence, B_PAD)
    query_start = tl.load(cu_seqlens_q + sequence)
    new = (tl.load(cu_seqlens_q + sequence + 1) - query_start).to(tl.int32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (tl.cdiv(new, BLOCK_Q) - 1 - tile_item) * BLOCK_Q + row // R
    real = (row < BLOCK_Q * R) & (token < new)
    split_items = tl.where(parts > 1, query_tiles * parts, 0)
    scratch = tl.sum(tl.where(tl.arange(0, B_PAD) < sequence, split_items, 0), 0) + tile_item * num_parts

    dv = tl.arange(0, DV_PAD)
    head = group * R + row % R
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        m = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        scratch_row = ((scratch + part).to(tl.int64) * G + group)[None, :] * BLOCK_M + row[:, None]
        weight = tl.load(part_lse + scratch_row, mask=(part < num_parts)[None, :] & real[:, None], other=float("-inf"))
        m_new = tl.maximum(m, tl.max(weight, 1))
        shift = tl.where(m_new > float("-inf"), m_new, 0.0)
        p = tl.exp2(weight - shift[:, None])
        pointers = part_out + scratch_row[:, :, None] * DV + dv[None, None, :]
        parts_out = tl.load(pointers, mask=(p > 0)[:, :, None] & (dv < DV)[None, None, :], other=0.0)
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * parts_out, 1)
        m = m_new
    out_row = (query_start + token) * (G * R) + head
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + out_row[:, None] * DV + dv[None, :], result.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
    if LSE:
        tl.store(lse + out_row, (m + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, mask=real)


def paged_attention_triton(query: Tensor, key_pages: Tensor, value_pages: Tensor, key_scales: Tensor | None, value_scales: Tensor | None,
                           block_tables: Tensor, kv_lengths: Tensor, cu_seqlens_q: Tensor, positions: Tensor, tree_bits: Tensor | None,
                           tree_sizes: Tensor | None, sinks: Tensor | None, max_query_length: int, scale: float, window: int | None,
                           softcap: float | None, return_lse: bool, config: PagedConfig | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`query [T, H, D]` over `key_pages [pages, P, G, D]` -> `(out [T, H, Dv], lse [T, H] float32 or [0])`. Checks nothing: the door did."""
    tokens, heads, dim = query.shape
    _, page_size, groups, value_dim = value_pages.shape
    sequences, group_heads = kv_lengths.shape[0], heads // groups
    config = config or paged_config(max_query_length * group_heads, max(dim, value_dim), query.element_size(), page_size)
    block_m = max(config.block_m, triton.next_power_of_2(group_heads))
    device = query.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    programs = max(1, processors * config.programs_per_sm // groups)  # a kv group
    query_tiles = min(tokens // (block_m // group_heads) + sequences, tokens)  # at most
    out = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=device)
    lse = torch.empty(tokens if return_lse else 0, heads, dtype=torch.float32, device=device)
    # a split tile has more key tiles than its share of programs, so there are at most `programs` such tiles and twice as many parts
    part_out = torch.empty(2 * programs, groups, block_m, value_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(2 * programs, groups, block_m, dtype=torch.float32, device=device)
    pad = lambda width: max(16, triton.next_power_of_2(width))  # noqa: E731 - what a matrix product takes
    shared = dict(R=group_heads, G=groups, DV=value_dim, DV_PAD=pad(value_dim), BLOCK_M=block_m, BLOCK_N=config.block_n,
                  MIN_TILES=max(1, 128 // config.block_n), B_PAD=triton.next_power_of_2(sequences), WINDOW=window, SINKS=sinks is not None,
                  LSE=return_lse)  # fmt: skip
    query = query if query.stride(2) == 1 else query.contiguous()
    if key_scales is not None:
        value_pages = value_pages.view(torch.int16)  # pairs of columns
    tree_words = None if tree_bits is None else tree_bits.view(torch.int32)  # [T, 2 W]: shifts of 32 bits are cheaper
    log2e = 1 / math.log(2)
    score_scale = scale * log2e * (1.0 if softcap is None else 2 / softcap)
    _attention_kernel[((query_tiles + programs) * groups,)](
        query, key_pages, value_pages, key_scales, value_scales, out, lse, part_out, part_lse, block_tables, kv_lengths, cu_seqlens_q, positions,
        tree_words, tree_sizes, sinks, sequences, programs, block_tables.shape[1], query.stride(0), query.stride(1), score_scale, (softcap or 0.0) * log2e,
        P=page_size, D=dim, D_PAD=pad(dim), WORDS=0 if tree_bits is None else tree_words.shape[1], SOFTCAP=softcap is not None,
        TAIL_N=min(config.block_n, 64), STAGES=config.num_stages, QUANTISED=key_scales is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=config.num_warps, num_stages=config.num_stages,
        maxnreg=config.max_registers, **shared)  # fmt: skip
    rows = min(block_m // group_heads, max_query_length) * group_heads
    _merge_kernel[(triton.cdiv(rows, 4), groups, min(programs, query_tiles))](
        out, lse, part_out, part_lse, kv_lengths, cu_seqlens_q, sinks, sequences, programs, ROWS=4, PARTS=8, num_warps=4, **shared)  # fmt: skip
    return out, lse
