"""Triton kernel of `attention.paged.device_batch`: places the next tokens of every row in one launch, not a dozen."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping


@triton.jit
def _place_kernel(lengths, alive, table, kv_lengths, cu_seqlens, positions, slots, count, width,
                  BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
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
    tl.store(positions + row * count + token, tl.maximum(place, 0), mask=token < count)
    tl.store(slots + row * count + token, tl.where(stored, slot, -1), mask=token < count)


def launch_place(lengths: Tensor, alive: Tensor, table: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `attention.paged.device_batch.place_tokens`."""
    rows, width = table.shape
    kv_lengths, cu_seqlens = torch.empty_like(lengths), lengths.new_empty(rows + 1)
    positions, slots = lengths.new_empty(rows * count), lengths.new_empty(rows * count)
    _place_kernel[(rows,)](
        lengths, alive.view(torch.uint8), table, kv_lengths, cu_seqlens, positions, slots, count, width,
        triton.next_power_of_2(count), num_warps=1, **overlapping(lengths.device),
    )  # fmt: skip
    return kv_lengths, cu_seqlens, positions, slots
