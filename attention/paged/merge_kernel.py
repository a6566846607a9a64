"""Joins the parts of split query tiles, the second kernel of paged attention (Dao et al. 2023, Flash-Decoding).

    out = sum_i 2^(lse_i - lse) out_i        lse = log2 (sum_i 2^lse_i + 2^sink)

The parts are in scratch memory as `part_out [parts, G, BLOCK_M, Dv]` and `part_lse [parts, G, BLOCK_M]` in units of
log2, those of one tile in consecutive places. Tiles that were not split are finished already and skipped here."""

import triton
import triton.language as tl
from torch import Tensor

from attention.paged.plan_kernel import BATCH_TENSORS, locate, parts_before, pick, split_plan
from attention.pdl_kernel import await_input, overlapping

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_result(out, lse, acc, total, m, out_row, real, DV: tl.constexpr, DV_PAD: tl.constexpr, LSE: tl.constexpr):
    """Write acc / total, and the natural log-sum-exp, to the rows `out_row` of `out [T * H, Dv]` and `lse [T * H]`."""
    dv = tl.arange(0, DV_PAD)
    total = tl.where(total > 0, total, 1.0)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_row[:, None] * DV + dv[None, :], result, mask=real[:, None] & (dv < DV)[None, :])
    if LSE:
        tl.store(lse + out_row, (m + tl.log2(total)) * LN2, mask=real)


@triton.jit
def _merge_rows(sequence, tile, scratch, num_parts, row, group, out, lse, part_out, part_lse, cu_seqlens_q, sinks,
                R: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
                SINKS: tl.constexpr, LSE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Join the parts of the rows `row [ROWS]` of one query tile, PARTS at a time."""
    BLOCK_Q: tl.constexpr = BLOCK_M // R
    query_start = tl.load(cu_seqlens_q + sequence)
    new = (tl.load(cu_seqlens_q + sequence + 1) - query_start).to(tl.int32)
    token = (tl.cdiv(new, BLOCK_Q) - 1 - tile) * BLOCK_Q + row // R
    real = (row < BLOCK_Q * R) & (token < new)

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
    store_result(out, lse, acc, total, m, (query_start + token) * (G * R) + head, real, DV, DV_PAD, LSE)


@triton.jit(do_not_specialize=["B", "programs", "row_blocks"], do_not_specialize_on_alignment=BATCH_TENSORS)
def _merge_kernel(out, lse, part_out, part_lse, kv_lengths, cu_seqlens_q, cu_tree_sizes, sinks, B, programs, row_blocks,
                  R: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr, WAVES: tl.constexpr, B_PAD: tl.constexpr,
                  WINDOW: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    """Persistent programs: each takes every num_programs-th (split tile, group, block of ROWS rows)."""
    await_input(OVERLAP, True)
    query_tiles, parts = split_plan(
        kv_lengths, cu_seqlens_q, cu_tree_sizes, B, programs, WINDOW, BLOCK_M // R, BLOCK_N, MIN_TILES, WAVES, B_PAD
    )
    split = tl.where(parts > 1, query_tiles, 0)
    for index in tl.range(tl.program_id(0), tl.sum(split, 0) * G * row_blocks, tl.num_programs(0), num_stages=1):
        row = index % row_blocks * ROWS + tl.arange(0, ROWS)
        sequence, tile = locate(split, index // row_blocks // G, B_PAD)
        num_parts = pick(parts, sequence, B_PAD)
        scratch = parts_before(query_tiles, parts, sequence, B_PAD) + tile * num_parts
        _merge_rows(
            sequence, tile, scratch, num_parts, row, index // row_blocks % G, out, lse, part_out, part_lse,
            cu_seqlens_q, sinks, R, G, DV, DV_PAD, BLOCK_M, SINKS, LSE, ROWS, PARTS,
        )  # fmt: skip


def merge_parts(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, kv_lengths: Tensor, cu_seqlens_q: Tensor,
                cu_tree_sizes: Tensor | None, sinks: Tensor | None, programs: int, processors: int, rows: int,
                split_tiles: int, groups: int, **shared) -> None:  # fmt: skip
    """Launch over `rows` rows of each of up to `split_tiles` tiles of `groups` kv heads.

    `shared` are the constants of the attention kernel. `cu_tree_sizes` is None without a window, where the plan does
    not depend on trees, so that one compiled kernel serves both."""
    row_blocks = triton.cdiv(rows, 4)
    _merge_kernel[(min(row_blocks * groups * split_tiles, 8 * processors),)](
        out, lse, part_out, part_lse, kv_lengths, cu_seqlens_q, cu_tree_sizes, sinks, kv_lengths.shape[0], programs,
        row_blocks,
        ROWS=4, PARTS=8 if shared["DV_PAD"] <= 256 else 2, num_warps=4, **shared, **overlapping(out.device),
    )  # fmt: skip
