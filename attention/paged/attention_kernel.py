"""Paged attention in Triton: split-KV flash attention over pages, with tree masks, GQA packing and quantised keys and
values.

One program holds a tile of BLOCK_M rows: BLOCK_M // R tokens of one sequence times the R = H / G query heads of one kv
group, so a key is read once for all of them. It walks a range of the sequence's keys in tiles of BLOCK_N with an online
softmax (Milakov and Gimelshein 2018; Dao et al. 2022), scores in units of log2:

    s = scale * log2(e) * <q, k>      m' = max(m, max s)      p = 2^(s - m')
    total = total * 2^(m - m') + sum p        acc = acc * 2^(m - m') + p v

Keys in the prefix that every row of the tile sees are walked without a mask; only the tiles behind it look at causality
and the tree: bit n of a node's ancestor words says whether it sees node n. With a sliding window every tile is masked.

Quantised pages: q . (k_scale k) = k_scale (q . k), and p (v_scale v) = (p v_scale) v, so scales touch rows of scores,
never tiles of keys.

Long sequences are split over their keys for every query length (attention/paged/plan_kernel.py says how); parts of
split tiles go to scratch memory as (out, log-sum-exp) and a second kernel joins them (attention/paged/merge_kernel.py).
Only as many programs start as the chip holds at once, and each takes its share of the items: how many there are, only
the device knows, and a program that starts for nothing holds a processor for some microseconds.

Measured on an H200 and left out, since nothing got faster: adding the values of the tile before while a tile's softmax
is computed, queries held in registers, loads through tensor-map descriptors."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.gpu import multiprocessors, shared_memory
from attention.paged.merge_kernel import LOG2E, merge_parts, store_result
from attention.paged.plan_kernel import BATCH_TENSORS, first_key, locate, parts_before, pick, split_plan
from attention.paged.tiles_kernel import even_and_odd, load_scales, load_tile, look_up, tile_visible, widen
from attention.pdl_kernel import await_input, overlapping


class PagedConfig(NamedTuple):
    """Tile sizes and launch options; `programs_per_sm` is what the plan counts on running at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def paged_config(
    rows: int, head_dim: int, element_size: int, page_size: int, crowded: bool = False, idle: bool = False
) -> PagedConfig:
    """The configuration for tiles of up to `rows` = query tokens x heads of a group, measured on an H200.

    `crowded`: whole query tiles fill the chip and walk over thousands of keys each, so larger tiles of keys need not be
    weighed against keeping every processor at work. `idle`: few of them walk over a few hundred keys each, and what
    counts is when the first and only one ends."""
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
    # many tiles of one sequence find its keys in the level-2 cache, and two programs a processor then hide each other's
    # softmax
    if rows > 256:
        return PagedConfig(64, 64, 4, 3, 2)
    if idle:
        return PagedConfig(64, 64, 4, 3, 1)
    return PagedConfig(128, 128, 8, 3, 1) if crowded and page_size % 128 == 0 else PagedConfig(128, 64, 8, 4, 1)


def tile_bytes(config: PagedConfig, key_columns: int, value_columns: int, query_bytes: int, page_bytes: int) -> int:
    """Shared memory of one program: its queries, and the keys and values of all pipeline stages."""
    return (
        config.block_m * key_columns * query_bytes
        + config.block_n * (key_columns + value_columns) * page_bytes * config.num_stages
    )


def fit(config: PagedConfig, tile: tuple[int, int, int, int], device: torch.device) -> PagedConfig:
    """`config` with as many pipeline stages, then as large a tile of keys, as the device's shared memory holds."""
    while tile_bytes(config, *tile) > shared_memory(device) and config.num_stages > 2:
        config = config._replace(num_stages=config.num_stages - 1)
    while tile_bytes(config, *tile) > shared_memory(device) and config.block_n > 16:
        config = config._replace(block_n=config.block_n // 2)
    return config


@triton.jit
def _walk(acc, odd, peak, total, m, q, begin, end, k_pages, v_pages, k_scales, v_scales, table, length, scale, softcap,
          index, first_node, bit_rows, position, tree_positions_end,
          G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
          DV_PAD: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
          QUANTISED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Online softmax over the keys begin .. end - 1, both multiples of BLOCK_N. MASKED: some rows do not see some of
    them.

    Quantised values come as 16-bit pairs of columns, since a product over keys needs pairs of keys and shared memory is
    read 16 bits wide; `acc` then has the even columns and `odd` the odd ones, both in units of `peak`, the largest
    scale so far: float16 has little range."""
    n = tl.arange(0, BLOCK_N)
    limit = tl.minimum(end, length)
    page = look_up(table, begin, limit, P, BLOCK_N)
    for key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        j = key + n
        inside = j < length
        if P % BLOCK_N == 0:  # one 64-bit address, the rest of the tile at constant distances
            first = page * P + key % P
            offsets = n
        else:
            first = 0
            offsets = page * P + j % P
        page = look_up(table, key + BLOCK_N, limit, P, BLOCK_N)  # a tile ahead: loads of keys then wait for no lookup
        k = load_tile(k_pages, first, offsets, inside, G, D, D_PAD, MASKED)
        s = tl.dot(q, tl.trans(widen(k, q.dtype)), input_precision=PRECISION)
        if QUANTISED:
            s = s * load_scales(k_scales, first, offsets, inside, G, MASKED)[None, :]
        s_scale = scale
        if SOFTCAP:  # cap * tanh(x) by way of 2^(2 x log2 e)
            s = softcap * (1 - 2 / (1 + tl.exp2(s * scale)))
            s_scale = 1.0
        if MASKED:
            visible = tile_visible(
                key, length, index, first_node, bit_rows, position, tree_positions_end, BLOCK_N, WORDS, WINDOW
            )
            s = tl.where(visible, s, float("-inf"))
        if QUANTISED:  # rows may have units of their own
            s = s * s_scale
            s_scale = 1.0
        m_new = tl.maximum(m, tl.max(s, 1) * s_scale)
        shift = m_new
        if MASKED:
            shift = tl.where(m_new > float("-inf"), m_new, 0.0)
        p = tl.exp2(s * s_scale - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        if QUANTISED:
            scales = load_scales(v_scales, first, offsets, inside, G, MASKED)
            pairs = load_tile(v_pages, first, offsets, inside, G, DV // 2, DV_PAD // 2, MASKED)
            v_even, v_odd = even_and_odd(pairs, k.dtype, q.dtype)
            larger = tl.maximum(peak, tl.max(scales, 0))
            alpha *= peak / larger
            p = (p * (scales / larger)[None, :]).to(q.dtype)
            acc = tl.dot(p, v_even, acc * alpha[:, None], input_precision=PRECISION)
            odd = tl.dot(p, v_odd, odd * alpha[:, None], input_precision=PRECISION)
            peak = larger
        else:
            acc = acc * alpha[:, None]
            v = load_tile(v_pages, first, offsets, inside, G, DV, DV_PAD, MASKED)
            acc = tl.dot(p.to(q.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return acc, odd, peak, total, m


@triton.jit
def _attend(sequence, item, num_parts, scratch, group, query, k_pages, v_pages, k_scales, v_scales, out, lse, part_out,
            part_lse, tables, kv_lengths, cu_seqlens_q, positions, tree_bits, cu_tree_sizes, tree_positions, sinks,
            table_width, stride_qt, stride_qh, scale, softcap,
            R: tl.constexpr, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr,
            DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
            STAGES: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
            QUANTISED: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Part `item % num_parts` of a query tile of `sequence` and its kv `group`; a part's result goes to place `scratch`
    of scratch memory.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // R
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
    q = tl.load(
        query + (packed * stride_qt + head * stride_qh)[:, None] + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if (
        QUANTISED and q.dtype == tl.bfloat16
    ):  # 8-bit numbers become float16 faster than bfloat16; a power of two brings q into range
        largest = tl.max(tl.abs(q.to(tl.float32)), 1)
        unit = tl.exp2(tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0))))
        q = (q.to(tl.float32) / unit[:, None]).to(tl.float16)
        scale = scale * unit[:, None]
    index = tl.where(real, length - new + token, -1)  # of the query in its sequence
    first_node = length
    bit_rows = packed
    if WORDS > 0:
        bit_rows = tree_bits + packed * WORDS
        nodes_end = tl.load(cu_tree_sizes + sequence + 1)
        first_node = length - (nodes_end - tl.load(cu_tree_sizes + sequence)).to(tl.int32)
        tree_positions += nodes_end
    position = index
    if WINDOW is not None and WORDS > 0:
        position = tl.load(positions + packed, mask=real, other=0).to(tl.int32)

    # the tile's own range of keys, cut to this part; [begin, clear) is seen by every row
    first_index = length - new + tile * BLOCK_Q
    lowest = first_key(length, new, length - first_node, WINDOW) // BLOCK_N * BLOCK_N
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
            acc, odd, peak, total, m, q, begin, clear, k_pages, v_pages, k_scales, v_scales, table, length, scale,
            softcap, index, first_node, bit_rows, position, tree_positions, G, P, D, DV, D_PAD, DV_PAD, BLOCK_N, WORDS,
            WINDOW, SOFTCAP, QUANTISED, PRECISION, False, STAGES,
        )  # fmt: skip
    # smaller tiles here: masks cost registers, and the tail is short
    acc, odd, peak, total, m = _walk(
        acc, odd, peak, total, m, q, clear, end, k_pages, v_pages, k_scales, v_scales, table, length, scale, softcap,
        index, first_node, bit_rows, position, tree_positions, G, P, D, DV, D_PAD, DV_PAD, TAIL_N, WORDS, WINDOW,
        SOFTCAP, QUANTISED, PRECISION, True, 2 if WINDOW is None and STAGES > 1 else STAGES,
    )  # fmt: skip

    if QUANTISED:
        acc = tl.join(acc, odd).reshape(BLOCK_M, DV_PAD) * peak
    dv = tl.arange(0, DV_PAD)
    if num_parts > 1:
        scratch_row = (scratch.to(tl.int64) * G + group) * BLOCK_M + row
        tl.store(
            part_out + scratch_row[:, None] * DV + dv[None, :],
            acc / tl.where(total > 0, total, 1.0)[:, None],
            mask=real[:, None] & (dv < DV)[None, :],
        )
        tl.store(part_lse + scratch_row, m + tl.log2(tl.where(total > 0, total, 1.0)), mask=real)
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            top = tl.maximum(m, sink)
            acc = acc * tl.exp2(m - top)[:, None]
            total = total * tl.exp2(m - top) + tl.exp2(sink - top)
            m = top
        store_result(out, lse, acc, total, m, packed * (G * R) + head, real, DV, DV_PAD, LSE)


@triton.jit(do_not_specialize=["B", "programs", "table_width"], do_not_specialize_on_alignment=BATCH_TENSORS)
def _attention_kernel(query, k_pages, v_pages, k_scales, v_scales, out, lse, part_out, part_lse, tables, kv_lengths,
                      cu_seqlens_q, positions, tree_bits, cu_tree_sizes, tree_positions, sinks, B, programs,
                      table_width, stride_qt, stride_qh, scale, softcap,
                      R: tl.constexpr, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                      D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      TAIL_N: tl.constexpr, STAGES: tl.constexpr, MIN_TILES: tl.constexpr, WAVES: tl.constexpr,
                      B_PAD: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
                      SINKS: tl.constexpr, QUANTISED: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
                      OVERLAP: tl.constexpr):  # fmt: skip
    """Programs that stay: each plans once, then takes every num_programs-th (item, group), an item being a query tile
    and one part of its keys.
    """
    await_input(OVERLAP, True)
    query_tiles, parts = split_plan(
        kv_lengths, cu_seqlens_q, cu_tree_sizes, B, programs, WINDOW, BLOCK_M // R, BLOCK_N, MIN_TILES, WAVES, B_PAD
    )
    items = query_tiles * parts
    for index in tl.range(tl.program_id(0), tl.sum(items, 0) * G, tl.num_programs(0), num_stages=1):
        sequence, item = locate(items, index // G, B_PAD)
        num_parts = pick(parts, sequence, B_PAD)
        scratch = parts_before(query_tiles, parts, sequence, B_PAD) + item
        _attend(
            sequence, item, num_parts, scratch, index % G, query, k_pages, v_pages, k_scales, v_scales, out, lse,
            part_out, part_lse, tables, kv_lengths, cu_seqlens_q, positions, tree_bits, cu_tree_sizes, tree_positions,
            sinks, table_width, stride_qt, stride_qh, scale, softcap, R, G, P, D, DV, D_PAD, DV_PAD, BLOCK_M, BLOCK_N,
            TAIL_N, STAGES, WORDS, WINDOW, SOFTCAP, SINKS, QUANTISED, LSE, PRECISION,
        )  # fmt: skip


def paged_attention_triton(query: Tensor, key_pages: Tensor, value_pages: Tensor, key_scales: Tensor | None,
                           value_scales: Tensor | None, block_tables: Tensor, kv_lengths: Tensor, cu_seqlens_q: Tensor,
                           positions: Tensor, tree_bits: Tensor | None, cu_tree_sizes: Tensor | None,
                           tree_positions: Tensor | None, sinks: Tensor | None, max_query_length: int, scale: float,
                           window: int | None, softcap: float | None, return_lse: bool,
                           config: PagedConfig | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`query [T, H, D]` over `key_pages [pages, P, G, D]` -> `(out [T, H, Dv], lse [T, H] float32 or [0])`. Checks
    nothing: the door did.
    """
    tokens, heads, dim = query.shape
    _, page_size, groups, value_dim = value_pages.shape
    sequences, group_heads = kv_lengths.shape[0], heads // groups
    # a matrix product takes 16 and more; with 8-bit tiles of 64 columns, Triton 3.6 lets wgmma read past the shared
    # memory that it reserved
    pad = lambda width: max(128 if key_scales is not None else 16, triton.next_power_of_2(width))
    device = query.device
    processors = multiprocessors(device)
    tile = pad(dim), pad(value_dim), query.element_size(), key_pages.element_size()
    if config is None:
        room, chip = (
            block_tables.shape[1] * page_size,
            processors // groups,
        )  # keys of a sequence, at most; query tiles that run at once
        crowded, idle = (
            tokens * group_heads >= 128 * chip and room >= 4096,
            tokens * group_heads <= 64 * chip and room <= 1024,
        )
        config = paged_config(
            max_query_length * group_heads, max(dim, value_dim), query.element_size(), page_size, crowded, idle
        )
        config = fit(config, tile, device)
    block_m = max(config.block_m, triton.next_power_of_2(group_heads))
    programs = max(1, processors * config.programs_per_sm // groups)  # a kv group
    resident = max(
        config.programs_per_sm,
        2 if config.num_warps == 4 and 2 * tile_bytes(config, *tile) <= shared_memory(device) else 1,
    )
    query_tiles = min(tokens // (block_m // group_heads) + sequences, tokens)  # at most
    out = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=device)
    lse = torch.empty(tokens if return_lse else 0, heads, dtype=torch.float32, device=device)
    # few query tiles are split to fill the chip once; with more, half a round of idle programs is worth avoiding
    waves = 1 if 2 * query_tiles <= programs else 2
    part_out = torch.empty(2 * waves * programs, groups, block_m, value_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(2 * waves * programs, groups, block_m, dtype=torch.float32, device=device)
    shared = dict(
        R=group_heads, G=groups, DV=value_dim, DV_PAD=pad(value_dim), BLOCK_M=block_m, BLOCK_N=config.block_n,
        MIN_TILES=max(1, 128 // config.block_n), WAVES=waves, B_PAD=triton.next_power_of_2(sequences), WINDOW=window,
        SINKS=sinks is not None, LSE=return_lse,
    )  # fmt: skip
    query = query if query.stride(2) == 1 else query.contiguous()
    if key_scales is not None:
        value_pages = value_pages.view(torch.int16)  # pairs of columns
    tree_words = None if tree_bits is None else tree_bits.view(torch.int32)  # [T, 2 W]: shifts of 32 bits are cheaper
    log2e = 1 / math.log(2)
    score_scale = scale * log2e * (1.0 if softcap is None else 2 / softcap)
    _attention_kernel[(min((query_tiles + waves * programs) * groups, resident * processors),)](
        query, key_pages, value_pages, key_scales, value_scales, out, lse, part_out, part_lse, block_tables, kv_lengths,
        cu_seqlens_q, positions, tree_words, cu_tree_sizes, tree_positions, sinks, sequences, programs,
        block_tables.shape[1], query.stride(0), query.stride(1), score_scale, (softcap or 0.0) * log2e,
        P=page_size, D=dim, D_PAD=pad(dim), WORDS=0 if tree_bits is None else tree_words.shape[1],
        SOFTCAP=softcap is not None, TAIL_N=min(config.block_n, 64), STAGES=config.num_stages,
        QUANTISED=key_scales is not None, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages, **shared, **overlapping(device),
    )  # fmt: skip
    rows = min(block_m // group_heads, max_query_length) * group_heads
    merge_parts(
        out, lse, part_out, part_lse, kv_lengths, cu_seqlens_q, None if window is None else cu_tree_sizes, sinks,
        programs, processors, rows, min(waves * programs, query_tiles), groups, **shared,
    )  # fmt: skip
    return out, lse
