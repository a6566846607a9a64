"""Triton kernels of `specdec.requests.kept`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping


@triton.jit
def _recent_kernel(tokens, lengths, found, capacity, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    await_input(OVERLAP)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = tl.maximum(tl.load(lengths + row) - count + place, 0)
    token = tl.load(tokens + row * capacity + at, mask=place < count, other=0)
    tl.store(found + row * count + place, token, mask=place < count)


def launch_recent(tokens: Tensor, lengths: Tensor, count: int) -> Tensor:
    """See `specdec.requests.kept.recent`."""
    found = tokens.new_empty(len(tokens), count)
    _recent_kernel[(len(tokens),)](
        tokens, lengths, found, tokens.stride(0), count, triton.next_power_of_2(count), num_warps=1,
        **overlapping(tokens.device),
    )  # fmt: skip
    return found


@triton.jit
def _keep_kernel(
    kept, features, path, counts, alive, room, nodes, width, depth, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Some columns of one row: token k of those kept is number count + 1 + k of the old ones and the accepted ones."""
    await_input(OVERLAP)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, count = (column < width) & (tl.load(alive + row) > 0), tl.load(counts + row).to(tl.int32)
    kept += row * room * width + column
    features += row * nodes * width + column
    for place in range(room):  # what is read lies after what is written
        source = count + 1 + place
        if source < room:
            value = tl.load(kept + source.to(tl.int64) * width, mask=inside, other=0.0)
        else:
            node = tl.load(path + row * depth + source - room - 1, mask=source > room, other=0)
            value = tl.load(features + node * width, mask=inside, other=0.0).to(kept.dtype.element_ty)
        tl.store(kept + place * width, value, mask=inside)


def launch_keep(kept: Tensor, features: Tensor, path: Tensor, counts: Tensor, alive: Tensor) -> None:
    """See `specdec.requests.kept.keep_accepted`."""
    (rows, room, width), block = kept.shape, min(1024, triton.next_power_of_2(kept.shape[2]))
    _keep_kernel[(rows, triton.cdiv(width, block))](
        kept, features.contiguous(), path.contiguous(), counts.contiguous(), alive.view(torch.uint8), room,
        features.shape[1], width, path.shape[1], block, num_warps=max(1, block // 256), **overlapping(kept.device),
    )  # fmt: skip
