"""Draws from the softmax of each row by Triton kernels, without writing the distribution: `draws.sample`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping

BLOCK = 4096  # scores that a program reads


@triton.jit
def _weight(score, top):
    """exp(score - top), 0 at -inf also where all scores are."""
    return tl.exp(tl.where(score == float("-inf"), float("-inf"), score - tl.where(top == float("-inf"), 0.0, top)))


@triton.jit
def _sums_kernel(scores, largest, sums, size, row_stride, parts, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """The largest score m of one block of one row, and the sum of exp(score - m)."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores + row * row_stride + place, mask=place < size, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    weight = _weight(value, top)
    tl.store(largest + row * parts + part, top)
    tl.store(sums + row * parts + part, tl.sum(weight.to(tl.float64), 0))


@triton.jit
def _find_kernel(
    scores, largest, sums, uniform, tokens, left, size, row_stride, parts,
    K: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """K draws of one row, each without the tokens drawn before it, and whether there was weight left for each.

    A draw is the first place whose cumulative weight exceeds uniform * total. Sums of blocks that lose a token are
    computed anew, since what is left of a peaked distribution vanishes in a difference."""
    await_input(OVERLAP)
    row, part, rank_of = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, RANKS)
    of_part = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(of_part, 0)
    scale = tl.where(of_part == float("-inf"), 0.0, tl.exp((of_part - top).to(tl.float64)))
    mass = tl.load(sums + row * parts + part, mask=part < parts, other=0.0) * scale
    drawn = tl.full((RANKS,), -1, tl.int32)
    for rank in tl.static_range(K):
        cumulative = tl.cumsum(mass, 0)
        total = tl.sum(tl.where(part == parts - 1, cumulative, 0.0), 0)
        wanted = tl.load(uniform + row * K + rank) * total
        chosen = tl.min(tl.where((cumulative > wanted) & (part < parts), part, parts), 0)
        last = tl.max(tl.where(mass > 0, part, 0), 0)  # rounding may leave nothing above `wanted`
        chosen = tl.where(chosen < parts, chosen, last)
        before = tl.sum(tl.where(part == chosen, cumulative - mass, 0.0), 0)
        # as in the sums: relative to the block's own largest score
        own = tl.max(tl.where(part == chosen, of_part, float("-inf")), 0)
        factor = tl.sum(tl.where(part == chosen, scale, 0.0), 0)
        place = chosen * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(scores + row * row_stride + place, mask=place < size, other=float("-inf")).to(tl.float32)
        weight = _weight(value, own).to(tl.float64) * factor
        if rank > 0:
            gone = tl.max((place[None, :] == drawn[:, None]).to(tl.int32), 0) > 0
            weight = tl.where(gone, 0.0, weight)
        reached = tl.cumsum(weight, 0) + before
        found = tl.min(tl.where((reached > wanted) & (weight > 0), place, 2147483647), 0)
        found = tl.minimum(found, tl.maximum(tl.max(tl.where(weight > 0, place, 0), 0), 0))
        found = tl.minimum(found, size - 1)
        tl.store(tokens + row * K + rank, found.to(tl.int64))
        tl.store(left + row * K + rank, total > 0)
        drawn = tl.where(rank_of == rank, found, drawn)
        if rank + 1 < K:
            mass = tl.where(part == chosen, tl.sum(tl.where(place == found, 0.0, weight), 0), mass)


def launch_sums(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """Of `rows [M, V]`, whose numbers lie side by side: the size of a block, and for each the largest score and the sum
    of exp(score - largest), `[M, blocks]`."""
    count, size = rows.shape
    block = min(BLOCK, triton.next_power_of_2(size))
    largest = rows.new_empty(count, triton.cdiv(size, block), dtype=torch.float32)
    sums = torch.empty_like(largest, dtype=torch.float64)
    _sums_kernel[largest.shape](
        rows, largest, sums, size, rows.stride(0), largest.shape[1], block, num_warps=min(8, max(1, block // 512)),
        **overlapping(rows.device),
    )  # fmt: skip
    return block, largest, sums


@triton.jit
def _probs_kernel(
    scores, largest, sums, probs, size, row_stride, parts, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The softmax of one block of one row."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    of_part = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(of_part, 0)
    scale = tl.where(of_part == float("-inf"), 0.0, tl.exp((of_part - top).to(tl.float64)))
    total = tl.sum(tl.load(sums + row * parts + part, mask=part < parts, other=0.0) * scale, 0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(scores + row * row_stride + place, mask=place < size, other=float("-inf")).to(tl.float32)
    tl.store(probs + row * size + place, _weight(value, top) / total.to(tl.float32), mask=place < size)


def _probs_of(rows: Tensor, block: int, largest: Tensor, sums: Tensor) -> Tensor:
    (count, size), parts = rows.shape, largest.shape[1]
    probs = torch.empty(count, size, dtype=torch.float32, device=rows.device)
    _probs_kernel[(count, parts)](
        rows, largest, sums, probs, size, rows.stride(0), parts, block, triton.next_power_of_2(parts),
        num_warps=min(8, max(1, block // 512)), **overlapping(rows.device),
    )  # fmt: skip
    return probs


def _as_rows(scores: Tensor) -> Tensor:
    rows = scores.reshape(-1, scores.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def launch_softmax(scores: Tensor) -> Tensor:
    """See `specdec.sampling.draws.softmax`."""
    rows = _as_rows(scores)
    return _probs_of(rows, *launch_sums(rows)).view(scores.shape)


def launch_sample(scores: Tensor, uniform: Tensor, with_probs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `specdec.sampling.draws.sample_distinct`."""
    rows, size, count = _as_rows(scores), scores.shape[-1], uniform.shape[-1]
    block, largest, sums = launch_sums(rows)
    parts = largest.shape[1]
    tokens, left = (torch.empty(uniform.shape, dtype=kind, device=rows.device) for kind in (torch.int64, torch.bool))
    _find_kernel[(len(rows),)](
        rows, largest, sums, uniform.contiguous(), tokens, left.view(torch.uint8), size, rows.stride(0), parts,
        count, triton.next_power_of_2(count), block, triton.next_power_of_2(parts),
        num_warps=min(8, max(1, block // 512)), **overlapping(rows.device),
    )  # fmt: skip
    return tokens, left, _probs_of(rows, block, largest, sums).view(scores.shape) if with_probs else None
