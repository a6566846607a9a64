"""Draws from the softmax of each row by Triton kernels, without writing the distribution: `draws.sample`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.scores_kernel import block_of, grid_of, load_scores, row_sums, weight_of


@triton.jit
def find_place(mass, uniform, parts, PARTS: tl.constexpr):
    """Of blocks with the weights `mass [PARTS]`: the one in which uniform * total is reached, uniform * total, what is
    before that block, and the total."""
    part, cumulative = tl.arange(0, PARTS), tl.cumsum(mass, 0)
    total = tl.sum(tl.where(part == parts - 1, cumulative, 0.0), 0)
    wanted = uniform * total
    chosen = tl.min(tl.where((cumulative > wanted) & (part < parts), part, parts), 0)
    last = tl.max(tl.where(mass > 0, part, 0), 0)  # rounding may leave nothing above `wanted`
    chosen = tl.where(chosen < parts, chosen, last)
    before = tl.sum(tl.where(part == chosen, cumulative - mass, 0.0), 0)
    return chosen, wanted, before, total


@triton.jit
def find_token(weight, place, wanted, before, size):
    """The first of the tokens `place` at which the sum of weights, with `before`, exceeds `wanted`."""
    reached = tl.cumsum(weight, 0) + before
    found = tl.min(tl.where((reached > wanted) & (weight > 0), place, 2147483647), 0)
    found = tl.minimum(found, tl.maximum(tl.max(tl.where(weight > 0, place, 0), 0), 0))
    return tl.minimum(found, size - 1)


@triton.jit
def _find_kernel(
    logits, heat, cuts, bands, largest, sums, uniform, tokens, left, size, row_stride, parts,
    K: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """K draws of one row, each without the tokens drawn before it, and whether there was weight left for each.

    A draw is the first place whose cumulative weight exceeds uniform * total. Sums of blocks that lose a token are
    computed anew, since what is left of a peaked distribution vanishes in a difference."""
    await_input(OVERLAP)
    row, part, rank_of = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, RANKS)
    top, of_part, factors, mass = row_sums(largest, sums, row, parts, PARTS)
    drawn = tl.full((RANKS,), -1, tl.int32)
    for rank in tl.static_range(K):
        chosen, wanted, before, total = find_place(mass, tl.load(uniform + row * K + rank), parts, PARTS)
        # as in the sums: relative to the block's own largest score
        own = tl.max(tl.where(part == chosen, of_part, float("-inf")), 0)
        factor = tl.sum(tl.where(part == chosen, factors, 0.0), 0)
        place = chosen * BLOCK + tl.arange(0, BLOCK)
        score = load_scores(logits, heat, cuts, bands, row, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
        weight = weight_of(score, own).to(tl.float64) * factor
        if rank > 0:
            gone = tl.max((place[None, :] == drawn[:, None]).to(tl.int32), 0) > 0
            weight = tl.where(gone, 0.0, weight)
        found = find_token(weight, place, wanted, before, size)
        tl.store(tokens + row * K + rank, found.to(tl.int64))
        tl.store(left + row * K + rank, total > 0)
        drawn = tl.where(rank_of == rank, found, drawn)
        if rank + 1 < K:
            mass = tl.where(part == chosen, tl.sum(tl.where(place == found, 0.0, weight), 0), mass)


@triton.jit
def _probs_kernel(
    logits, heat, cuts, bands, largest, sums, probs, size, row_stride, nodes, batch_stride, parts,
    SPAN: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The softmax of some blocks of one row."""
    await_input(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    top, of_part, factors, mass = row_sums(largest, sums, row, parts, PARTS)
    total = tl.sum(mass, 0).to(tl.float32)
    into = probs + (row // nodes) * batch_stride + (row % nodes) * size
    for part in range(tl.program_id(1) * SPAN, tl.minimum(tl.program_id(1) * SPAN + SPAN, parts)):
        place = part * BLOCK + tl.arange(0, BLOCK)
        score = load_scores(logits, heat, cuts, bands, row, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
        tl.store(into + place, weight_of(score, top) / total, mask=place < size)


def launch_probs(source: tuple, flags: dict, largest: Tensor, sums: Tensor, probs: Tensor) -> None:
    """Write the softmax of M rows into `probs [B, n, V]` with B * n = M, of which each batch row is contiguous."""
    logits = source[0]
    (count, size), parts = logits.shape, largest.shape[1]
    if probs.shape[0] * probs.shape[1] != count or probs.shape[2] != size or probs.stride()[1:] != (size, 1):
        raise ValueError(f"{count} rows of {size} probabilities do not fit {list(probs.shape)} at {probs.stride()}")
    grid, span = grid_of(count, parts)
    _probs_kernel[grid](
        *source, largest, sums, probs, size, logits.stride(0), probs.shape[1], probs.stride(0), parts,
        SPAN=span, PARTS=triton.next_power_of_2(parts), **flags, **block_of(size), **overlapping(logits.device),
    )  # fmt: skip


def launch_find(source: tuple, flags: dict, largest: Tensor, sums: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """K draws of each of M rows, with `uniform [M, K]`, and whether there was weight left for each."""
    logits, (count, ranks), parts = source[0], uniform.shape, largest.shape[1]
    tokens = torch.empty(uniform.shape, dtype=torch.int64, device=logits.device)
    left = torch.empty(uniform.shape, dtype=torch.bool, device=logits.device)
    _find_kernel[(count,)](
        *source, largest, sums, uniform.contiguous(), tokens, left.view(torch.uint8), logits.shape[1],
        logits.stride(0), parts, ranks, triton.next_power_of_2(ranks), triton.next_power_of_2(parts), **flags,
        **block_of(logits.shape[1]), **overlapping(logits.device),
    )  # fmt: skip
    return tokens, left


@triton.jit
def _totals_kernel(weights, totals, least, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """The sum and the smallest of one row."""
    await_input(OVERLAP)
    row, some = tl.program_id(0).to(tl.int64), tl.zeros((BLOCK,), tl.float64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + row * size + place, mask=place < size, other=0.0)
        some += weight.to(tl.float64)
        lowest = tl.minimum(lowest, weight)
    tl.store(totals + row, tl.sum(some, 0))
    tl.store(least + row, tl.min(lowest, 0))


def launch_totals(weights: Tensor) -> tuple[Tensor, Tensor]:
    """See `specdec.sampling.draws.totals_of`."""
    totals = torch.empty(weights.shape[:-1], dtype=torch.float64, device=weights.device)
    least = torch.empty_like(totals, dtype=torch.float32)
    block = block_of(weights.shape[-1])
    _totals_kernel[(totals.numel(),)](
        weights.contiguous(), totals, least, weights.shape[-1], **block, **overlapping(weights.device)
    )
    return totals, least
