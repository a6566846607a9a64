"""Triton kernel of `specdec.rounds.packing`: one program packs the outcome of one row."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.acceptance import Acceptance
from specdec.trees.tensors import TreeTensors


@triton.jit
def _pack_kernel(
    packed, counts, path, emitted, faults, row_strides, strides, widths, parent, valid, depth, parent_row, valid_row,
    depth_row, width, deepest, levels, size, GROUPS: tl.constexpr, FLAGS: tl.constexpr, PATH: tl.constexpr,
    FAULT: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row; with SIZE it is of a draft whose rows differ. Tables with row stride 0 are shared by all rows."""
    await_input(OVERLAP)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, PATH)
    packed, path = packed + row * width, path + row * deepest
    tl.store(packed, tl.load(counts + row))
    tl.store(packed + 1 + place, tl.load(path + place, mask=place < deepest, other=0), mask=place < deepest)
    token = tl.load(emitted + row * (deepest + 1) + place, mask=place <= deepest, other=0)
    tl.store(packed + 1 + deepest + place, token, mask=place <= deepest)
    column = tl.arange(0, FAULT)
    for flag in tl.static_range(FLAGS):
        found = tl.zeros([FAULT], tl.int32)
        for i in tl.static_range(len(faults)):
            if GROUPS[i] == flag:
                inside = column < widths[i]
                about = tl.load(faults[i] + row * row_strides[i] + column * strides[i], mask=inside, other=0)
                if about.dtype.is_floating():
                    if about.dtype != tl.float64:
                        about = about.to(tl.float32)
                    found = found | (about - about != 0).to(tl.int32)  # inf - inf is NaN
                else:
                    found = found | (about != 0).to(tl.int32)
        tl.store(packed + 2 * (deepest + 1) + flag, tl.max(found, 0).to(tl.int64))
    if SIZE > 0:
        node, after = tl.arange(0, SIZE), packed + 2 * (deepest + 1) + FLAGS
        inside, parent, valid = node < size, parent + row * parent_row, valid + row * valid_row
        above = tl.load(parent + node, mask=inside, other=-1)
        there = (tl.load(valid + node, mask=inside, other=0) > 0) & (node > 0)
        level = tl.where(there, tl.load(depth + row * depth_row + node, mask=inside, other=0), 0)
        for at in range(levels):
            tl.store(after + at, tl.sum((level == at + 1).to(tl.int64), 0))
        for at in range(deepest + 1):
            mine = tl.load(path + at - 1, mask=at > 0, other=0)
            children = tl.sum((there & (above == mine)).to(tl.int64), 0)
            siblings = there & (above == tl.load(parent + mine)) & (node <= mine)
            exists = (tl.load(valid + mine) > 0) & (mine > 0)
            tl.store(after + levels + at, children)
            tl.store(after + levels + deepest + 1 + at, tl.where(exists, tl.sum(siblings.to(tl.int64), 0), 0) - 1)


def launch_pack(faults: Sequence[Tensor], groups: Sequence[int], verdict: Acceptance, emitted: Tensor,
                tables: TreeTensors | None, width: int) -> Tensor:  # fmt: skip
    """`[A, width]`, see `packing.pack`; groups: the place of each fault among their messages; tables: of the draft."""
    rows, deepest = verdict.path.shape
    given = [x.view(torch.uint8) if x.dtype == torch.bool else x for x in faults]
    given = [x[:, None] if x.ndim == 1 else x for x in given]
    packed, widest, flags = emitted.new_empty(rows, width), max(x.shape[1] for x in given), max(groups) + 1
    of_tree: tuple[Tensor | int, ...] = (packed, packed, packed, 0, 0, 0)
    sizes = 0, 0, 0
    if tables is not None:
        made = [x.contiguous() for x in (tables.parent, tables.valid.view(torch.uint8), tables.depth)]
        of_tree = *made, *(x.stride(0) if len(x) > 1 else 0 for x in made)
        size = made[0].shape[1]
        sizes = width - 4 * (deepest + 1) - flags, size, triton.next_power_of_2(size)
    _pack_kernel[(rows,)](
        packed, verdict.counts.contiguous(), verdict.path.contiguous(), emitted.contiguous(), tuple(given),
        tuple(x.stride(0) for x in given), tuple(x.stride(1) for x in given), tuple(x.shape[1] for x in given),
        *of_tree, width, deepest, *sizes[:2], GROUPS=tuple(groups), FLAGS=flags,
        PATH=triton.next_power_of_2(deepest + 1), FAULT=triton.next_power_of_2(max(1, widest)), SIZE=sizes[2],
        num_warps=1, **overlapping(packed.device),
    )  # fmt: skip
    return packed
