"""Block verification as two Triton kernels: `specdec.acceptance.block.block`."""

import torch
import triton
import triton.language as tl

from attention.pdl_kernel import await_input, overlapping
from specdec.acceptance.base import Acceptance
from specdec.acceptance.walk_kernel import WIDE, draw_from, prob_of, subtract
from specdec.sampling.noise import RoundNoise, Stream
from specdec.sampling.scores_kernel import block_of, grid_of, load_scores, row_sums, weight_of
from specdec.sampling.warped import Warped
from specdec.trees.draft import Draft


@triton.jit
def _joint(
    logits, heat, cuts, bands, largest, sums, tokens, probs, row, count, nodes, size, row_stride, parts,
    PARTS: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """P_count of a row."""
    joint = tl.full((), 1.0, tl.float64)
    for i in range(count):
        at, token = row * nodes + i, tl.load(tokens + i + 1)
        top, of_part, factors, mass = row_sums(largest, sums, at, parts, PARTS)
        total = tl.sum(mass, 0).to(tl.float32)
        p = prob_of(
            logits, heat, cuts, bands, at, token, top, total, size, row_stride, SHIFT, HEATED, CUT, BANDED
        )  # fmt: skip
        q = tl.load(probs + (row * (nodes - 1) + i) * size + token)
        joint = tl.minimum(joint * (p.to(tl.float64) / q.to(tl.float64)), 1.0)
    return joint.to(tl.float32)


@triton.jit
def _lacking_kernel(
    logits, heat, cuts, bands, largest, sums, tokens, probs, lacking, nodes, size, row_stride, parts,
    PARTS: tl.constexpr, SPAN: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum of max(P_i p - q, 0) over some blocks, after i tokens of one row."""
    await_input(OVERLAP)
    row, i = tl.program_id(0).to(tl.int64) // (nodes - 1), tl.program_id(0) % (nodes - 1)
    joint = _joint(
        logits, heat, cuts, bands, largest, sums, tokens + row * nodes, probs, row, i, nodes, size, row_stride, parts,
        PARTS, SHIFT, HEATED, CUT, BANDED,
    )  # fmt: skip
    at = row * nodes + i
    top, of_part, factors, mass = row_sums(largest, sums, at, parts, PARTS)
    total = tl.sum(mass, 0).to(tl.float32)
    for part in range(tl.program_id(1) * SPAN, tl.minimum(tl.program_id(1) * SPAN + SPAN, parts)):
        place = part * BLOCK + tl.arange(0, BLOCK)
        score = load_scores(logits, heat, cuts, bands, at, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
        q = tl.load(probs + (row * (nodes - 1) + i) * size + place, mask=place < size, other=0.0)
        left = tl.maximum(joint * (weight_of(score, top) / total) - q, 0.0)
        tl.store(lacking + (row * (nodes - 1) + i) * parts + part, tl.sum(left.to(tl.float64), 0))


@triton.jit
def _block_kernel(
    logits, heat, cuts, bands, largest, sums, tokens, probs, lacking, valid, valid_stride, accept, accept_stride, last,
    rest, partial, counts, next_tokens, nodes, size, row_stride, parts,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: how many tokens are accepted, and the next one."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    tokens, valid = tokens + row * nodes, valid + row * valid_stride
    length = tl.zeros((), tl.int32)
    for i in range(1, nodes):
        length += (tl.load(valid + i) != 0).to(tl.int32)
    count = tl.zeros((), tl.int32)
    for i in range(1, length + 1):
        joint = _joint(
            logits, heat, cuts, bands, largest, sums, tokens, probs, row, i, nodes, size, row_stride, parts,
            PARTS, SHIFT, HEATED, CUT, BANDED,
        )  # fmt: skip
        h = joint
        if i < length:
            mine = lacking + (row * (nodes - 1) + i) * parts
            w = tl.sum(tl.load(mine + part, mask=part < parts, other=0.0), 0).to(tl.float32)
            h = tl.where(w + (1 - joint) > 0, w / (w + (1 - joint)), 0.0)
        count = tl.where(tl.load(accept + row * accept_stride + i - 1) < h.to(tl.float64), i, count)
    at, written = row * nodes + count, tl.zeros((), tl.int32)
    if count < length:
        joint = _joint(
            logits, heat, cuts, bands, largest, sums, tokens, probs, row, count, nodes, size, row_stride, parts,
            PARTS, SHIFT, HEATED, CUT, BANDED,
        )  # fmt: skip
        top, of_part, factors, mass = row_sums(largest, sums, at, parts, PARTS)
        q = probs + (row * (nodes - 1) + count) * size
        whole, _ = subtract(
            logits, heat, cuts, bands, q, rest + row * size, rest + row * size, partial + row * parts, tokens, tokens,
            valid, at, top, tl.sum(mass, 0).to(tl.float32), 1.0, joint, tl.full((), 1.0, tl.float64), written, 0,
            size, row_stride, parts, True, SHIFT, HEATED, CUT, BANDED, BLOCK, WIDE,
        )  # fmt: skip
        written = (whole > 0).to(tl.int32)
    token = draw_from(
        logits, heat, cuts, bands, largest, sums, rest + row * size, partial + row * parts, at, tl.load(last + row),
        written, size, row_stride, parts, PARTS, SHIFT, HEATED, CUT, BANDED, BLOCK,
    )  # fmt: skip
    tl.store(counts + row, count.to(tl.int64))
    tl.store(next_tokens + row, token.to(tl.int64))


def launch_block(draft: Draft, scores: Warped, noise: RoundNoise) -> Acceptance:
    """See `specdec.acceptance.block.block`, for a chain with distributions."""
    assert draft.probs is not None
    (rows, nodes), valid = draft.tokens.shape, draft.tables.valid.contiguous()
    probs = draft.probs.float().contiguous()
    logits, (largest, sums), tokens = scores.logits, scores.stats, draft.tokens.contiguous()
    size, parts, device = logits.shape[1], largest.shape[1], logits.device
    make = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=device)
    lacking = make(rows * (nodes - 1), parts, dtype=torch.float64)
    rest, partial = make(rows, size, dtype=torch.float32), make(rows, parts, dtype=torch.float64)
    counts, next_tokens = make(rows, dtype=torch.int64), make(rows, dtype=torch.int64)
    accept, last = noise.uniform(Stream.ACCEPT, nodes - 1), noise.uniform(Stream.NEXT, 1).contiguous()
    shared = dict(PARTS=triton.next_power_of_2(parts), **scores.flags, **overlapping(device))
    of_all, tail = (*scores.source, largest, sums, tokens, probs, lacking), (nodes, size, logits.stride(0), parts)
    grid, span = grid_of(len(lacking), parts)
    _lacking_kernel[grid](*of_all, *tail, SPAN=span, **shared, **block_of(size))
    _block_kernel[(rows,)](
        *of_all, valid.view(torch.uint8), valid.stride(0) if len(valid) > 1 else 0, accept, accept.stride(0), last,
        rest, partial, counts, next_tokens, *tail, WIDE=WIDE, **shared, **block_of(size) | {"num_warps": 16},
    )  # fmt: skip
    return Acceptance.at(draft, counts, next_tokens)
