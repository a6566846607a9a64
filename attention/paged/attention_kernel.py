"""Paged attention in Triton: split-KV flash attention over pages, with tree masks, GQA packing and 8-bit pages.

One program holds a tile of BLOCK_M rows: BLOCK_M // R tokens of one sequence times the R = H / G query heads of one kv
group, so a key is read once for all of them. It walks a range of the sequence's keys in tiles of BLOCK_N
(`attention.paged.softmax_kernel`; Dao et al. 2022). Keys in the prefix that every row of the tile sees are walked
without a mask; only the tiles after it apply causality and the tree: bit n of a node's ancestor words says whether it
sees node n. With a sliding window every tile is masked; the first keys, which no window hides, are walked before it.

Long sequences are split over their keys for every query length (`attention.paged.plan_kernel`); parts of split tiles
go to scratch memory as (out, log-sum-exp) and a second kernel joins them (`attention.paged.merge_kernel`). Only as many
programs start as the GPU runs at once, and each takes its share of the items: their number is known on the device only,
and a program that starts for nothing occupies a processor for some microseconds.

A group of more heads than a tile has rows for is computed as SPLITS groups of R heads, all of which read its keys.

Measured on an H200 and left out, since nothing got faster: adding the values of the tile before while a tile's softmax
is computed, queries held in registers, loads through tensor-map descriptors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.gpu import multiprocessors, shared_memory
from attention.paged.launch_config import PagedConfig, fit, head_splits, key_tiles, padded, paged_config, tile_bytes
from attention.paged.merge_kernel import LOG2E, merge_parts, store_result
from attention.paged.plan_kernel import BATCH_TENSORS, first_key, locate, parts_before, pick, split_plan
from attention.paged.softmax_kernel import online_softmax
from attention.pdl_kernel import await_input, overlapping


@triton.jit
def _attend_tile(sequence, item, num_parts, scratch, group, query, k_pages, v_pages, k_scales, v_scales, out, lse,
                 part_out, part_lse, tables, kv_lengths, cu_seqlens_q, positions, tree_bits, cu_tree_sizes,
                 tree_positions, sinks, table_width, stride_qt, stride_qh, scale, softcap,
                 R: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                 DV: tl.constexpr, MAIN: tl.constexpr, D_PAD: tl.constexpr, REST_PAD: tl.constexpr,
                 DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
                 STAGES: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr,
                 SOFTCAP: tl.constexpr, SINKS: tl.constexpr, QUANTISED: tl.constexpr, IN_KEYS: tl.constexpr,
                 LSE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Part `item % num_parts` of a query tile of `sequence` and `group` of R heads; parts are stored at `scratch`."""
    BLOCK_Q: tl.constexpr = BLOCK_M // R
    KV_G: tl.constexpr = G // SPLITS
    kv_group = group // SPLITS
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
    pointers = query + (packed * stride_qt + head * stride_qh)[:, None] + d[None, :]
    q = tl.load(pointers, mask=real[:, None] & (d < MAIN)[None, :], other=0.0)
    q_rest = q
    if REST_PAD > 0:
        rest = tl.arange(0, REST_PAD)
        pointers = query + MAIN + (packed * stride_qt + head * stride_qh)[:, None] + rest[None, :]
        q_rest = tl.load(pointers, mask=real[:, None] & (rest < D - MAIN)[None, :], other=0.0)
    if QUANTISED and q.dtype == tl.bfloat16:
        # 8-bit numbers are converted to float16 faster than to bfloat16; a power of two brings q into its range
        largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), tl.max(tl.abs(q_rest.to(tl.float32)), 1))
        unit = tl.exp2(tl.ceil(tl.log2(tl.where(largest > 0, largest, 1.0))))
        q = (q.to(tl.float32) / unit[:, None]).to(tl.float16)
        q_rest = (q_rest.to(tl.float32) / unit[:, None]).to(tl.float16)
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

    # this part of the tile's range of keys; every row sees all of [begin, clear)
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
    k_pages += kv_group * D
    v_pages += kv_group * (DV // 2 if QUANTISED else DV)
    if QUANTISED:
        k_scales += kv_group
        v_scales += kv_group
    table = tables + sequence.to(tl.int64) * table_width
    if WINDOW is None:
        acc, odd, peak, total, m = online_softmax(
            acc, odd, peak, total, m, q, q_rest, begin, clear, k_pages, v_pages, k_scales, v_scales, table, length,
            scale, softcap, index, first_node, bit_rows, position, tree_positions, KV_G, P, D, DV, MAIN, D_PAD,
            REST_PAD, DV_PAD, BLOCK_N, WORDS, WINDOW, FIRST, SOFTCAP, QUANTISED, IN_KEYS, PRECISION, False, STAGES,
        )  # fmt: skip
    if FIRST > 0:  # keys before the window of the tile, walked with its first part
        first_end = tl.where(part == 0, tl.minimum((FIRST + TAIL_N - 1) // TAIL_N * TAIL_N, begin), 0)
        acc, odd, peak, total, m = online_softmax(
            acc, odd, peak, total, m, q, q_rest, 0, first_end, k_pages, v_pages, k_scales, v_scales, table, length,
            scale, softcap, index, first_node, bit_rows, position, tree_positions, KV_G, P, D, DV, MAIN, D_PAD,
            REST_PAD, DV_PAD, TAIL_N, WORDS, WINDOW, FIRST, SOFTCAP, QUANTISED, IN_KEYS, PRECISION, True, STAGES,
        )  # fmt: skip
    # smaller tiles here: masks cost registers, and the tail is short
    acc, odd, peak, total, m = online_softmax(
        acc, odd, peak, total, m, q, q_rest, clear, end, k_pages, v_pages, k_scales, v_scales, table, length, scale,
        softcap, index, first_node, bit_rows, position, tree_positions, KV_G, P, D, DV, MAIN, D_PAD, REST_PAD, DV_PAD,
        TAIL_N, WORDS, WINDOW, FIRST, SOFTCAP, QUANTISED, IN_KEYS, PRECISION, True,
        2 if WINDOW is None and STAGES > 1 else STAGES,
    )  # fmt: skip

    if QUANTISED:
        acc = tl.join(acc, odd).reshape(BLOCK_M, DV_PAD) * peak
    dv = tl.arange(0, DV_PAD)
    if num_parts > 1:
        scratch_row = (scratch.to(tl.int64) * G + group) * BLOCK_M + row
        positive = tl.where(total > 0, total, 1.0)
        part_at = part_out + scratch_row[:, None] * DV + dv[None, :]
        tl.store(part_at, acc / positive[:, None], mask=real[:, None] & (dv < DV)[None, :])
        tl.store(part_lse + scratch_row, m + tl.log2(positive), mask=real)
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
                      R: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                      DV: tl.constexpr, MAIN: tl.constexpr, D_PAD: tl.constexpr, REST_PAD: tl.constexpr,
                      DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
                      STAGES: tl.constexpr, MIN_TILES: tl.constexpr, WAVES: tl.constexpr, B_PAD: tl.constexpr,
                      WORDS: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
                      SINKS: tl.constexpr, QUANTISED: tl.constexpr, IN_KEYS: tl.constexpr, LSE: tl.constexpr,
                      PRECISION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Persistent programs: each plans once, then takes every num_programs-th (item, group).

    An item is a query tile and one part of its keys."""
    await_input(OVERLAP, True)
    query_tiles, parts = split_plan(
        kv_lengths, cu_seqlens_q, cu_tree_sizes, B, programs, WINDOW, BLOCK_M // R, BLOCK_N, MIN_TILES, WAVES, B_PAD
    )
    items = query_tiles * parts
    for index in tl.range(tl.program_id(0), tl.sum(items, 0) * G, tl.num_programs(0), num_stages=1):
        sequence, item = locate(items, index // G, B_PAD)
        num_parts = pick(parts, sequence, B_PAD)
        scratch = parts_before(query_tiles, parts, sequence, B_PAD) + item
        _attend_tile(
            sequence, item, num_parts, scratch, index % G, query, k_pages, v_pages, k_scales, v_scales, out, lse,
            part_out, part_lse, tables, kv_lengths, cu_seqlens_q, positions, tree_bits, cu_tree_sizes, tree_positions,
            sinks, table_width, stride_qt, stride_qh, scale, softcap, R, G, SPLITS, P, D, DV, MAIN, D_PAD, REST_PAD,
            DV_PAD, BLOCK_M, BLOCK_N, TAIL_N, STAGES, WORDS, WINDOW, FIRST, SOFTCAP, SINKS, QUANTISED, IN_KEYS, LSE,
            PRECISION,
        )  # fmt: skip


def _shipped_config(query: Tensor, block_tables: Tensor, max_query_length: int, page_size: int, groups: int,
                    value_dim: int, tile: tuple[int, int, int, int]) -> PagedConfig:  # fmt: skip
    tokens, heads, dim = query.shape
    rows, keys = tokens * heads // groups, block_tables.shape[1] * page_size  # keys of a sequence, at most
    chip = multiprocessors(query.device) // groups  # query tiles that run at once
    crowded, idle = rows >= 128 * chip and keys >= 4096, rows <= 64 * chip and keys <= 1024
    longest, widest = max_query_length * heads // groups, max(dim, value_dim)
    return fit(paged_config(longest, widest, query.element_size(), page_size, crowded, idle), tile, query.device)


def paged_attention_triton(query: Tensor, key_pages: Tensor, value_pages: Tensor, key_scales: Tensor | None,
                           value_scales: Tensor | None, block_tables: Tensor, kv_lengths: Tensor, cu_seqlens_q: Tensor,
                           positions: Tensor, tree_bits: Tensor | None, cu_tree_sizes: Tensor | None,
                           tree_positions: Tensor | None, sinks: Tensor | None, max_query_length: int, scale: float,
                           window: int | None, first_tokens: int, softcap: float | None, return_lse: bool,
                           config: PagedConfig | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the op `specdec::paged_attention`: `(out [T, H, Dv], lse [T, H] float32 or [0, H])`; checks nothing.

    query: `[T, H, D]`
    key_pages, value_pages: `[num_pages, P, G, D]` and `[num_pages, P, G, Dv]`; the latter may be a view of the former
    key_scales, value_scales: `[num_pages, P, G]` where the pages are 8-bit
    block_tables … tree_positions: as in `AttentionBatch`; sinks: `[H]`

    `config` replaces the shipped tile sizes."""
    tokens, heads, dim = query.shape
    _, page_size, kv_groups, value_dim = value_pages.shape
    sequences, device, quantised = kv_lengths.shape[0], query.device, key_scales is not None
    in_keys = value_pages.data_ptr() == key_pages.data_ptr()  # values are the first numbers of keys
    value_columns = padded(value_dim, quantised)
    main, key_columns, rest_columns = key_tiles(dim, quantised)
    if in_keys:
        main, key_columns, rest_columns = value_dim, value_columns, padded(dim - value_dim, quantised)
    tile = key_columns + rest_columns, 0 if in_keys else value_columns, query.element_size(), key_pages.element_size()
    splits = head_splits(heads // kv_groups, max(dim, value_dim), tile, device)
    groups = kv_groups * splits
    group_heads = heads // groups
    if config is None:
        config = _shipped_config(query, block_tables, max_query_length, page_size, groups, value_dim, tile)
    processors = multiprocessors(device)
    block_m = max(config.block_m, triton.next_power_of_2(group_heads))
    programs = max(1, processors * config.programs_per_sm // groups)  # a kv group
    two_fit = config.num_warps == 4 and 2 * tile_bytes(config, *tile) <= shared_memory(device)
    resident = processors * max(config.programs_per_sm, 2 if two_fit else 1)
    query_tiles = min(tokens // (block_m // group_heads) + sequences, tokens)  # at most
    # few query tiles are split to fill the GPU once; with more, half a wave of idle programs is worth avoiding
    waves = 1 if 2 * query_tiles <= programs else 2
    out = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=device)
    lse = torch.empty(tokens if return_lse else 0, heads, dtype=torch.float32, device=device)
    part_out = torch.empty(2 * waves * programs, groups, block_m, value_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(2 * waves * programs, groups, block_m, dtype=torch.float32, device=device)
    shared = dict(
        R=group_heads, G=groups, DV=value_dim, DV_PAD=value_columns, BLOCK_M=block_m, BLOCK_N=config.block_n,
        MIN_TILES=max(1, 128 // config.block_n), WAVES=waves, B_PAD=triton.next_power_of_2(sequences), WINDOW=window,
        SINKS=sinks is not None, LSE=return_lse,
    )  # fmt: skip
    query = query if query.stride(2) == 1 else query.contiguous()
    if quantised:
        value_pages = value_pages.view(torch.int16)  # pairs of columns
    tree_words = None if tree_bits is None else tree_bits.view(torch.int32)  # [T, 2 W]: shifts of 32 bits are cheaper
    score_scale = scale * LOG2E.value * (1.0 if softcap is None else 2 / softcap)
    _attention_kernel[(min((query_tiles + waves * programs) * groups, resident),)](
        query, key_pages, value_pages, key_scales, value_scales, out, lse, part_out, part_lse, block_tables, kv_lengths,
        cu_seqlens_q, positions, tree_words, cu_tree_sizes, tree_positions, sinks, sequences, programs,
        block_tables.shape[1], query.stride(0), query.stride(1), score_scale, (softcap or 0.0) * LOG2E.value,
        SPLITS=splits, P=page_size, D=dim, MAIN=main, D_PAD=key_columns, REST_PAD=rest_columns,
        WORDS=0 if tree_words is None else tree_words.shape[1],
        FIRST=0 if window is None else first_tokens, SOFTCAP=softcap is not None, TAIL_N=min(config.block_n, 64),
        STAGES=config.num_stages, QUANTISED=quantised, IN_KEYS=in_keys,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages, **shared, **overlapping(device),
    )  # fmt: skip
    tile_rows = min(block_m // group_heads, max_query_length) * group_heads
    merge_parts(
        out, lse, part_out, part_lse, kv_lengths, cu_seqlens_q, None if window is None else cu_tree_sizes, sinks,
        programs, processors, tile_rows, min(waves * programs, query_tiles), groups, **shared,
    )  # fmt: skip
    return out, lse
