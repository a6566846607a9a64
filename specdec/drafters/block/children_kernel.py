"""Triton kernel of `children.likeliest_among`: one program for each node."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.drafters.block.slots import Factors
from specdec.sampling.scores_kernel import weight_of
from specdec.sampling.top_kernel import largest_of

BLOCK_R = 64  # of the rank, multiplied at once


@triton.jit
def _children_kernel(
    own, vectors, index, weight, among, values, columns, own_row, vector_row, index_row, weight_row, among_row, nodes,
    size, rank, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of one node: the log-probabilities of its K likeliest children, and their columns of `among`."""
    await_input(OVERLAP)
    row, node, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    there, r = column < size, tl.arange(0, BLOCK_R)
    token = tl.load(among + row * among_row + column, mask=there, other=0)
    vector = vectors + tl.load(index + row * index_row + node) * vector_row
    score = tl.load(own + row * own_row + token, mask=there, other=float("-inf")).to(tl.float32)
    added = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rank, BLOCK_R):
        inside = start + r < rank
        said = tl.load(vector + start + r, mask=inside, other=0.0).to(tl.float32)
        of_token = weight + token[:, None] * weight_row + start + r[None, :]
        tile = tl.load(of_token, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        added += tl.sum(tile * said[None, :], 1)
    score += added
    top = tl.max(score, 0)
    total = top + tl.log(tl.sum(weight_of(score, top), 0))
    total = tl.where(tl.max((score != score).to(tl.int32), 0) > 0, float("nan"), total)
    log = tl.where(score - total > 0, 0.0, score - total)
    log = tl.where(score == float("-inf"), score, log)
    out = (row * nodes + node) * K
    largest_of(log, tl.where(there, column, 2147483647), values + out, columns + out, K)


def launch_children(factors: Factors, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `children.likeliest_among`; the log-probabilities are float32."""
    last = lambda x: x if x.stride(1) == 1 else x.contiguous()
    own, vectors, index, weight = (last(x) for x in factors)
    among, (rows, nodes) = last(among), index.shape
    values = torch.empty(rows, nodes, count, dtype=torch.float32, device=among.device)
    columns = torch.empty_like(values, dtype=torch.int64)
    block = triton.next_power_of_2(max(2, among.shape[1]))
    _children_kernel[(rows, nodes)](
        own, vectors, index, weight, among, values, columns, own.stride(0), vectors.stride(0), index.stride(0),
        weight.stride(0), among.stride(0), nodes, among.shape[1], weight.shape[1],
        count, block, BLOCK_R, num_warps=min(8, max(1, block // 32)), **overlapping(among.device),
    )  # fmt: skip
    return values, columns
