"""Triton kernel of `specdec.drafters.grown`: one program chooses the best nodes of one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping

CHUNK = 32  # nodes that all others are compared with at once


@triton.jit
def comparable(value):
    """Values with NaN, of rows that are reported as faulty, last."""
    return tl.where(value != value, float("-inf"), value)


@triton.jit
def _choose_kernel(
    tokens, values, parents, position, tokens_out, parents_out, count, size, SORTED: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_input(OVERLAP)
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = c < count
    value = tl.load(values + row * count + c, mask=inside, other=float("-inf"))
    known, rank = comparable(value), tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = comparable(tl.load(values + row * count + other, mask=other < count, other=float("-inf")))
        earlier = (theirs[None, :] == known[:, None]) & (other[None, :] < c[:, None])
        better = ((theirs[None, :] > known[:, None]) | earlier) & (other < count)[None, :]
        rank += tl.sum(better.to(tl.int32), 1)
    chosen = inside & (rank < size)
    place = rank if SORTED else tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(position + row * count + c, tl.where(chosen, place, 0), mask=inside)
    tl.debug_barrier()  # all positions are there before parents look for theirs
    parent = tl.load(parents + row * count + c, mask=chosen, other=-1)
    # isfinite, for which NaN is not
    exists = (parent >= 0) & (tl.abs(value) < float("inf"))
    above = tl.load(position + row * count + parent, mask=chosen & exists, other=0)
    tl.store(parents_out + row * size + place, tl.where(exists, above, -1), mask=chosen)
    token = tl.load(tokens + row * count + c, mask=chosen, other=0)
    tl.store(tokens_out + row * size + place, token, mask=chosen)


def launch_choose(tokens: Tensor, values: Tensor, parents: Tensor, size: int, by_value: bool) -> tuple[Tensor, Tensor]:
    """Tokens and parents `[A, size]`; see `grown.best_tree`."""
    rows, count = values.shape
    found = tokens.new_empty(rows, size), tokens.new_empty(rows, size)
    block, position = triton.next_power_of_2(count), torch.empty_like(parents)
    _choose_kernel[(rows,)](
        tokens, values, parents, position, *found, count, size, SORTED=by_value, BLOCK=block, CHUNK=CHUNK,
        num_warps=max(1, min(16, block // 64)), **overlapping(tokens.device),
    )  # fmt: skip
    return found
