"""Triton kernels of `attention.paged.device_batch`: places the next tokens of every row, and what is moved."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping


@triton.jit
def _place_kernel(lengths, alive, table, kv_lengths, cu_seqlens, positions, slots, count, width,
                  depths, words, depths_row, words_row, bits, cu_nodes, node_positions, nodes,
                  BLOCK: tl.constexpr, WORDS: tl.constexpr, NODES: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One row; with NODES > 0 its new tokens are the last of so many `nodes`, which have ancestor bits of WORDS."""
    await_input(OVERLAP)
    row = tl.program_id(0)
    length = tl.load(lengths + row) + count
    tl.debug_barrier()  # every thread has read the old length
    tl.store(lengths + row, length)
    lives = tl.load(alive + row) > 0
    tl.store(kv_lengths + row, tl.where(lives, tl.maximum(length, count), count))
    tl.store(cu_seqlens + row + 1, (row + 1).to(tl.int64) * count)
    tl.store(cu_seqlens, 0)
    token = tl.arange(0, BLOCK)
    place = length - count + token
    stored = lives & (place >= 0)
    at = table + row.to(tl.int64) * width + tl.minimum(tl.maximum(place, 0), width - 1)
    slot = tl.load(at, mask=token < count, other=0)
    tl.store(slots + row * count + token, tl.where(stored, slot, -1), mask=token < count)
    if NODES == 0:
        tl.store(positions + row * count + token, tl.maximum(place, 0), mask=token < count)
    else:
        node = tl.arange(0, NODES)
        token, inside = node - (nodes - count), node < nodes
        place = length - nodes + tl.load(depths + row * depths_row + node, mask=inside, other=0)
        tl.store(node_positions + row * nodes + node, place, mask=inside)
        tl.store(positions + row * count + token, tl.maximum(place, 0), mask=inside & (token >= 0))
        for word in tl.static_range(WORDS):
            bit = tl.load(words + row * words_row + node * WORDS + word, mask=inside & (token >= 0), other=0)
            tl.store(bits + (row * count + token) * WORDS + word, bit, mask=inside & (token >= 0))
        tl.store(cu_nodes + row + 1, (row + 1).to(tl.int64) * nodes)
        tl.store(cu_nodes, 0)


def launch_place(lengths: Tensor, alive: Tensor, table: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `attention.paged.device_batch.place_tokens`."""
    return _launch(lengths, alive, table, count, (lengths, lengths, 0, 0, lengths, lengths, lengths, 0), 0, 0)


def launch_place_nodes(lengths: Tensor, alive: Tensor, table: Tensor, count: int, depths: Tensor,
                       words: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `attention.paged.device_batch.place_nodes`."""
    rows, (given, nodes, width) = len(lengths), words.shape
    depths, words, strides = depths.contiguous(), words.contiguous(), (nodes, nodes * width) if given > 1 else (0, 0)
    new = lengths.new_empty(rows * count, width), lengths.new_empty(rows + 1), lengths.new_empty(rows * nodes)
    block = triton.next_power_of_2(nodes)
    return *_launch(lengths, alive, table, count, (depths, words, *strides, *new, nodes), width, block), *new


def _launch(lengths: Tensor, alive: Tensor, table: Tensor, count: int, of_nodes: tuple, words: int,
            block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, width = table.shape
    kv_lengths, cu_seqlens = torch.empty_like(lengths), lengths.new_empty(rows + 1)
    positions, slots = lengths.new_empty(rows * count), lengths.new_empty(rows * count)
    _place_kernel[(rows,)](
        lengths, alive.view(torch.uint8), table, kv_lengths, cu_seqlens, positions, slots, count, width, *of_nodes,
        BLOCK=triton.next_power_of_2(count), WORDS=words, NODES=block, num_warps=1, **overlapping(lengths.device),
    )  # fmt: skip
    return kv_lengths, cu_seqlens, positions, slots


@triton.jit
def _moves_kernel(starts, path, counts, alive, table, sources, targets, cu_moves, depth, path_row, width,
                  BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    await_input(OVERLAP)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, start = place < depth, tl.load(starts + row)
    source = start + tl.load(path + row * path_row + place, mask=inside, other=0)
    target = start + 1 + place
    kept = inside & (place < tl.load(counts + row)) & (tl.load(alive + row) > 0) & (source != target)
    table += row * width
    of_source = tl.load(table + tl.minimum(tl.maximum(source, 0), width - 1), mask=kept, other=-1)
    of_target = tl.load(table + tl.minimum(tl.maximum(target, 0), width - 1), mask=kept, other=-1)
    tl.store(sources + row * depth + place, of_source, mask=inside)
    tl.store(targets + row * depth + place, of_target, mask=inside)
    tl.store(cu_moves + row + 1, (row + 1) * depth)
    tl.store(cu_moves, 0)


def launch_moves(starts: Tensor, path: Tensor, counts: Tensor, alive: Tensor,
                 table: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run `attention.paged.device_batch.moves_of`."""
    rows, depth = path.shape
    path = path if path.stride(1) == 1 else path.contiguous()
    moves = [table.new_empty(size) for size in (rows * depth, rows * depth, rows + 1)]
    _moves_kernel[(rows,)](
        starts.contiguous(), path, counts.contiguous(), alive.view(torch.uint8), table, *moves, depth, path.stride(0),
        table.shape[1], BLOCK=triton.next_power_of_2(max(1, depth)), num_warps=1, **overlapping(table.device),
    )  # fmt: skip
    return moves[0], moves[1], moves[2]
