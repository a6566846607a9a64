"""Triton kernels of `attention.recurrent.convolution`: outputs of the nodes of a tree, and the window after a path."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tree_kernel(states, cells, inputs, weight, bias, sees, out, kept, state_cell, input_row, input_node, input_channel,
                 sees_row, kept_cell, M, C, BM: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, TREE: tl.constexpr,
                 BIAS: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """A program owns a block of channels of a row; states `[cells, C, K - 1]`, weight `[C, K]`.

    The ancestors of a node in their order are the nodes that it sees in theirs, so the nearest is the last one."""
    row, channel, node = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BM)
    cell, is_channel, is_node = tl.load(cells + row).to(tl.int64), channel < C, node < M
    left = is_node[:, None] & (node[:, None] > node[None, :])  # ancestors that are not passed yet
    if TREE:
        seen = tl.load(sees + row * sees_row + node[:, None] * M + node[None, :], mask=left, other=0)
        left = left & (seen != 0)
    depth = tl.sum(left.to(tl.int32), 1)
    inside = is_node[:, None] & is_channel[None, :]
    base = inputs + row * input_row + channel[None, :] * input_channel
    at = tl.where(is_node, node, -1)
    sums = tl.zeros((BM, BC), tl.float32)
    if BIAS:
        sums += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(K):
        here = at >= 0
        x = tl.load(base + at[:, None] * input_node, mask=inside & here[:, None], other=0.0)
        if KEEP and back == 0:
            to = kept + cell * kept_cell + node[:, None] * C + channel[None, :]
            tl.store(to, x.to(kept.dtype.element_ty), mask=inside)
        if back > 0:
            place = K - 1 - back + depth  # in the window, of what lies before the root
            window = states + cell * state_cell + channel[None, :] * (K - 1) + place[:, None]
            old = tl.load(window, mask=inside & ~here[:, None], other=0.0)
            x = tl.where(here[:, None], x, old.to(x.dtype))
        tap = tl.load(weight + channel * K + K - 1 - back, mask=is_channel, other=0.0).to(tl.float32)
        sums += x.to(tl.float32) * tap[None, :]
        at = tl.max(tl.where(left, node[None, :], -1), 1)
        left = left & (node[None, :] < at[:, None])
    tl.store(out + (row * M + node[:, None]) * C + channel[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _replay_kernel(states, kept, cells, places, counts, state_layer, state_cell, kept_layer, kept_cell, places_row, C,
                   BC: tl.constexpr, BW: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """A program owns a block of channels of a row in a layer; states `[layers, cells, C, W]`."""
    layer, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, slot = tl.program_id(2) * BC + tl.arange(0, BC), tl.arange(0, BW)
    cell, count = tl.load(cells + row).to(tl.int64), tl.load(counts + row)
    window = states + layer * state_layer + cell * state_cell + channel[:, None] * W
    inside = (channel < C)[:, None] & (slot < W)[None, :]
    source = count + slot  # among the window and then the path
    new = (source >= W) & (slot < W)
    place = tl.load(places + row * places_row + source - W, mask=new, other=0)
    of_path = kept + layer * kept_layer + cell * kept_cell + place[None, :] * C + channel[:, None]
    x = tl.load(of_path, mask=inside & new[None, :], other=0.0)
    old = tl.load(window + source[None, :], mask=inside & ~new[None, :], other=0.0)
    moved = tl.where(new[None, :], x, old)
    tl.debug_barrier()  # another thread may read what this one is about to overwrite
    tl.store(window + slot[None, :], moved, mask=inside & (count > 0))


def launch_tree(states: Tensor, cells: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None,
                sees: Tensor | None, kept: Tensor | None) -> Tensor:  # fmt: skip
    """Outputs `[B, M, C]`; see `attention.recurrent.nodes.run_nodes`.

    states: `[cells, C, K - 1]`; inputs: `[B, M, C]`; sees: uint8 `[B, M, M]`; kept: `[cells, room, C]`; all but the
    inputs contiguous, `sees` but for rows that may be one"""
    rows, nodes, channels = inputs.shape
    out, sees_row = inputs.new_empty(rows, nodes, channels), 0 if sees is None or len(sees) == 1 else sees.stride(0)
    block = min(64, triton.next_power_of_2(channels))
    _tree_kernel[(rows, triton.cdiv(channels, block))](
        states, cells, inputs, weight, weight if bias is None else bias, inputs if sees is None else sees, out,
        out if kept is None else kept, states.stride(0), *inputs.stride(), sees_row,
        0 if kept is None else kept.stride(0), nodes, channels, BM=max(16, triton.next_power_of_2(nodes)), BC=block,
        K=weight.shape[1], TREE=sees is not None, BIAS=bias is not None, KEEP=kept is not None,
        num_warps=8 if nodes > 32 else 4,
    )  # fmt: skip
    return out


def launch_replay(states: Tensor, kept: Tensor, cells: Tensor, places: Tensor, counts: Tensor) -> None:
    """Move windows on, in place; states `[layers, cells, C, K - 1]` and kept `[layers, cells, room, C]`, contiguous."""
    layers, _, channels, width = states.shape
    if width == 0:
        return
    block = min(256, triton.next_power_of_2(channels))
    _replay_kernel[(layers, len(cells), triton.cdiv(channels, block))](
        states, kept, cells, places, counts, *states.stride()[:2], *kept.stride()[:2], places.stride(0), channels,
        BC=block, BW=triton.next_power_of_2(width), W=width, num_warps=4,
    )  # fmt: skip
