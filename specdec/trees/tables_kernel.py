"""Triton kernel of `specdec.trees.tensors`: one program makes all index tables of one row's tree."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping

CHUNK = 32  # nodes that all others are compared with at once


@triton.jit
def _above(parents, node):
    """The parent of each node as the tables have it: an earlier one, or the root."""
    return tl.where(node > 0, tl.maximum(tl.minimum(tl.load(parents + node), node - 1), 0), 0)


@triton.jit
def _bit(node, word):
    """The bit of each node in the word number `word`, 0 for those of other words."""
    there = (node >= 64 * word) & (node < 64 * word + 64)
    return tl.where(there, tl.full(node.shape, 1, tl.int64) << tl.where(there, node - 64 * word, 0), 0)


@triton.jit
def _tables_kernel(
    parents, parent_out, valid_out, depth_out, sees_out, words_out, path_out, children_out, internal_out, broken_out,
    size, deepest, most, SIZE: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_input(OVERLAP)
    row, node = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE).to(tl.int64)
    parents, inside = parents + row * size, node < size
    given = tl.load(parents + node, mask=inside, other=-1)
    mine = tl.minimum(given, node - 1)
    valid = inside & ((mine >= 0) | (node == 0))
    begin, at = tl.where(valid, node, 0), row * size + node
    tl.store(parent_out + at, tl.maximum(mine, 0), mask=inside)
    tl.store(valid_out + at, valid.to(tl.uint8), mask=inside)

    above, depth = begin, (begin > 0).to(tl.int64)
    for _ in range(deepest):
        above = _above(parents, above)
        depth += (above > 0).to(tl.int64)
    tl.store(depth_out + at, depth, mask=inside)

    above, path = begin, path_out + at * deepest
    for step in range(deepest):
        place = depth - 1 - step
        tl.store(path + place, above, mask=inside & (place >= 0) & (place < deepest))
        tl.store(path + step, tl.zeros([SIZE], tl.int64), mask=inside & (step >= depth))
        tl.store(path, above, mask=inside & (depth > deepest) & (step == deepest - 1))  # of a broken tree
        above = _above(parents, above)

    for word in tl.static_range(WORDS):
        bits, above = _bit(node, word), begin
        if word == 0:
            bits = bits | 1  # the root
        for _ in range(deepest):
            above = _above(parents, above)
            bits = bits | _bit(above, word)
        tl.store(words_out + at * WORDS + word, bits, mask=inside)
        bit = tl.arange(0, 64)
        there = inside[:, None] & (64 * word + bit < size)[None, :]
        flag = ((bits[:, None] >> bit[None, :]) & 1).to(tl.uint8)
        tl.store(sees_out + at[:, None] * size + 64 * word + bit[None, :], flag, mask=there)

    count, rank = tl.zeros([SIZE], tl.int64), tl.zeros([SIZE], tl.int64)
    for start in range(0, size, CHUNK):
        other = (start + tl.arange(0, CHUNK)).to(tl.int64)
        theirs = tl.minimum(tl.load(parents + other, mask=other < size, other=-1), other - 1)
        count += tl.sum((theirs[None, :] == node[:, None]).to(tl.int64), 1)
        rank += tl.sum(((theirs[None, :] == mine[:, None]) & (other[None, :] < node[:, None])).to(tl.int64), 1)
    tl.store(children_out + (row * size + mine) * most + rank, node, mask=inside & (mine >= 0) & (rank < most))
    for place in range(most):
        tl.store(children_out + at * most + place, tl.zeros([SIZE], tl.int64), mask=inside & (place >= count))
    has = (inside & (count > 0)).to(tl.int64)
    tl.store(internal_out + at, (tl.cumsum(has, 0) - 1) * has, mask=inside)

    exists, up = inside & ((given >= 0) | (node == 0)), tl.minimum(tl.maximum(given, 0), size - 1)
    orphan = exists & (up > 0) & (tl.load(parents + up) < 0)
    wrong, above = ((given >= node) & (node > 0) & inside) | orphan, tl.where(exists, node, 0)
    for _ in range(deepest):
        further = tl.minimum(tl.maximum(tl.load(parents + above), 0), size - 1)
        above = tl.where(above > 0, further, 0)
    tl.store(broken_out + row, tl.max((wrong | (above > 0)).to(tl.int32), 0).to(tl.uint8))


def launch_tables(parents: Tensor, max_depth: int, max_children: int) -> tuple[Tensor, ...]:
    """The fields of `TreeTensors`, and which rows are broken, `[B]`; see `tensors.tables_of` and `tensors.broken`."""
    rows, size = parents.shape
    words, device = -(-size // 64), parents.device
    most = min(max_children, size)  # `tables_of` sorts the nodes, of which there are no more
    long = lambda *shape: torch.empty(rows, *shape, dtype=torch.int64, device=device)
    flag = lambda *shape: torch.empty(rows, *shape, dtype=torch.bool, device=device)
    parent, depth, internal, valid, sees = long(size), long(size), long(size), flag(size), flag(size, size)
    seen, path, children, broken = long(size, words), long(size, max_depth), long(size, most), flag()
    block = triton.next_power_of_2(size)
    _tables_kernel[(rows,)](
        parents.contiguous(), parent, valid.view(torch.uint8), depth, sees.view(torch.uint8), seen, path, children,
        internal, broken.view(torch.uint8), size, max_depth, most, SIZE=block, WORDS=words, CHUNK=CHUNK,
        num_warps=max(1, min(16, block // 16)), **overlapping(device),
    )  # fmt: skip
    return parent, valid, depth, sees, seen, path, children, internal, broken
