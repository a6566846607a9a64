"""Rejection child by child, down a whole tree, as one Triton kernel with a program for each row.

`rejection`, `tree_iid` and `tree_distinct` are one rule here: a chain is a tree with one child a node. Nothing is
written for a node but what is left of its distribution after a rejection, since a token is first of all a number to be
compared. See `specdec.acceptance.tree_iid.child_by_child`, which it equals.
"""

import torch
import triton
import triton.language as tl

from attention.pdl_kernel import await_input, overlapping
from specdec.acceptance.base import Acceptance
from specdec.sampling.draw_kernel import find_place, find_token
from specdec.sampling.noise import RoundNoise, Stream
from specdec.sampling.scores_kernel import block_of, load_scores, row_sums, weight_of
from specdec.sampling.warped import Warped
from specdec.trees.draft import Draft

WIDE = 4  # blocks that are read at a time


@triton.jit
def draw_from(
    logits, heat, cuts, bands, largest, sums, rest, partial, at, uniform, written, size, row_stride, parts,
    PARTS: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token drawn from the scores of row `at`, or from the weights `rest`, with the sums `partial`, if `written`."""
    part = tl.arange(0, PARTS)
    top, of_part, factors, mass = row_sums(largest, sums, at, parts, PARTS)
    if written:
        mass = tl.load(partial + part, mask=part < parts, other=0.0)
    chosen, wanted, before, _ = find_place(mass, uniform, parts, PARTS)
    place = chosen * BLOCK + tl.arange(0, BLOCK)
    if written:
        weight = tl.load(rest + place, mask=place < size, other=0.0).to(tl.float64)
    else:
        score = load_scores(logits, heat, cuts, bands, at, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
        own = tl.max(tl.where(part == chosen, of_part, float("-inf")), 0)
        weight = weight_of(score, own).to(tl.float64) * tl.sum(tl.where(part == chosen, factors, 0.0), 0)
    return find_token(weight, place, wanted, before, size)


@triton.jit
def prob_of(
    logits, heat, cuts, bands, at, token, top, total, size, row_stride,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """The probability of one token in row `at`."""
    score = load_scores(logits, heat, cuts, bands, at, token, size, row_stride, SHIFT, HEATED, CUT, BANDED)
    return weight_of(score, top) / total


@triton.jit
def subtract(
    logits, heat, cuts, bands, q, before, rest, partial, tokens, children, valid, at, top, total, mass, factor, q_total,
    written, count, size, row_stride, parts,
    DRAWN: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """rest <- max(factor * p - q, 0), with its sums by block; returns the sum and that of q without `count` children.

    p is what is `written` in `before`, divided by `mass`, or the softmax of row `at`. Without DRAWN q is 1 at the last
    of those children."""
    whole, others = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for group in range(0, parts, WIDE):
        part = group + tl.arange(0, WIDE)
        place = part[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        if written:
            p = tl.load(before + place, mask=place < size, other=0.0) / mass
        else:
            score = load_scores(logits, heat, cuts, bands, at, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
            p = weight_of(score, top) / total
        if DRAWN:
            drawn = tl.load(q + place, mask=place < size, other=0.0)
        else:
            drawn = tl.zeros((WIDE, BLOCK), tl.float32)
        taken = drawn
        for branch in range(count):
            child = tl.load(children + branch)
            token = tl.load(tokens + child)
            if DRAWN:
                taken = tl.where((place == token) & (tl.load(valid + child) != 0), 0.0, taken)
            else:
                drawn = tl.where(place == token, 1.0, drawn)
        left = tl.maximum(factor * p - drawn / q_total.to(tl.float32), 0.0)
        tl.store(rest + place, left, mask=place < size)
        of_part = tl.sum(left.to(tl.float64), 1)
        tl.store(partial + part, of_part, mask=part < parts)
        whole += tl.sum(of_part, 0)
        others += tl.sum(tl.sum(taken.to(tl.float64), 1), 0)
    tl.debug_barrier()  # what some threads wrote others read
    return whole, others


@triton.jit
def _walk_kernel(
    logits, heat, cuts, bands, largest, sums, tokens, probs, q_sums, children, children_stride, internal,
    internal_stride, valid, valid_stride, accept, accept_stride, last, rest, partial, counts, path, next_tokens, known,
    nodes, inner_nodes, size, row_stride, parts, depths, branches, rows,
    DRAWN: tl.constexpr, TOTALS: tl.constexpr, DISTINCT: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: from the root down, the children of a node in order; then the next token."""
    await_input(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    tokens += row * nodes
    valid += row * valid_stride
    children += row * children_stride
    internal += row * internal_stride
    node, depth, going = tl.zeros((), tl.int64), tl.zeros((), tl.int32), tl.full((), 1, tl.int32)
    turn, written, mass = tl.zeros((), tl.int64), tl.zeros((), tl.int32), tl.full((), 1.0, tl.float32)
    while going != 0:
        at, chosen = row * nodes + node, tl.zeros((), tl.int64)
        top, of_part, factors, of_row = row_sums(largest, sums, at, parts, PARTS)
        total = tl.sum(of_row, 0).to(tl.float32)
        inner = row * inner_nodes + tl.load(internal + node)
        q_total = tl.full((), 1.0, tl.float64)
        written = written * 0
        mine = children + node * branches
        if depth < depths:
            if TOTALS:
                q_total = tl.load(q_sums + inner)
            for branch in range(branches):
                child = tl.load(mine + branch)
                if (chosen == 0) & (child > 0):
                    if tl.load(valid + child) != 0:
                        token = tl.load(tokens + child)
                        if written:
                            held = tl.load(rest + (turn * rows + row) * size + token) / mass
                        else:
                            held = prob_of(
                                logits, heat, cuts, bands, at, token, top, total, size, row_stride, SHIFT, HEATED, CUT,
                                BANDED,
                            )  # fmt: skip
                        offered = tl.full((), 1.0, tl.float64)
                        if DRAWN:
                            offered = tl.load(probs + inner * size + token).to(tl.float64)
                        uniform = tl.load(accept + row * accept_stride + depth * branches + branch)
                        if uniform * offered < held.to(tl.float64) * q_total:
                            chosen = child
                        else:
                            other = 1 - turn
                            whole, left = subtract(
                                logits, heat, cuts, bands, probs + inner * size, rest + (turn * rows + row) * size,
                                rest + (other * rows + row) * size, partial + (other * rows + row) * parts, tokens,
                                mine, valid, at, top, total, mass, 1.0, q_total, written, branch + 1, size, row_stride,
                                parts, DRAWN, SHIFT, HEATED, CUT, BANDED, BLOCK, WIDE,
                            )  # fmt: skip
                            if whole > 0:  # else q is p, and nothing was to be rejected
                                turn, written, mass = other, written * 0 + 1, whole.to(tl.float32)
                            if DISTINCT:
                                q_total = left
        if chosen > 0:
            token = tl.load(tokens + chosen)
            tl.store(path + row * depths + depth, chosen)
            tl.store(known + row * (depths + 1) + depth, token)
            node, depth = chosen, depth + 1
        else:
            going = going * 0
    token = draw_from(
        logits, heat, cuts, bands, largest, sums, rest + (turn * rows + row) * size,
        partial + (turn * rows + row) * parts, row * nodes + node, tl.load(last + row), written, size, row_stride,
        parts, PARTS, SHIFT, HEATED, CUT, BANDED, BLOCK,
    )  # fmt: skip
    for place in range(depth, depths + 1):
        tl.store(known + row * (depths + 1) + place, token.to(tl.int64))
    tl.store(next_tokens + row, token.to(tl.int64))
    tl.store(counts + row, depth.to(tl.int64))


def launch_walk(draft: Draft, scores: Warped, noise: RoundNoise) -> Acceptance:
    """See `specdec.acceptance.tree_iid.child_by_child`; a deterministic draft is a chain."""
    tables, (rows, nodes) = draft.tables, draft.tokens.shape
    branches, depths, drawn = tables.children.shape[2], draft.max_depth, draft.probs is not None
    logits, (largest, sums) = scores.logits, scores.stats
    size, parts, device = logits.shape[1], largest.shape[1], logits.device
    accept, totals = noise.uniform(Stream.ACCEPT, max(1, depths * branches)), draft.totals
    make = lambda *shape, dtype=torch.int64: torch.empty(*shape, dtype=dtype, device=device)
    rest, partial = make(2, rows, size, dtype=torch.float32), make(2, rows, parts, dtype=torch.float64)
    path, known = torch.zeros(rows, depths, dtype=torch.int64, device=device), make(rows, depths + 1)
    counts, next_tokens = make(rows), make(rows)
    of_rows = [x.contiguous() for x in (tables.children, tables.internal, tables.valid.view(torch.uint8))]
    tables_and_strides = [y for x in of_rows for y in (x, x.stride(0) if len(x) > 1 else 0)]
    q = draft.probs.float().contiguous() if draft.probs is not None else sums
    _walk_kernel[(rows,)](
        *scores.source, largest, sums, draft.tokens.contiguous(), q, q if totals is None else totals,
        *tables_and_strides, accept, accept.stride(0),
        noise.uniform(Stream.NEXT, 1).contiguous(), rest, partial, counts, path, next_tokens, known, nodes,
        q.shape[1], size, logits.stride(0), parts, depths, branches, rows, DRAWN=drawn, TOTALS=totals is not None,
        DISTINCT=draft.distinct, PARTS=triton.next_power_of_2(parts), WIDE=WIDE, **scores.flags,
        **block_of(size) | {"num_warps": 16}, **overlapping(device),
    )  # fmt: skip
    return Acceptance(counts, path, next_tokens, known)
