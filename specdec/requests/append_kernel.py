"""`specdec.requests.rows.append_reference` as one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping


@triton.jit
def _append_kernel(
    tokens, lengths, limits, alive, emitted, counts, ends, capacity, width, num_ends,
    WIDTH: tl.constexpr, ENDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_input(OVERLAP)
    row, place = tl.program_id(0), tl.arange(0, WIDTH)
    length, limit, lives = tl.load(lengths + row), tl.load(limits + row), tl.load(alive + row) > 0
    new = tl.load(emitted + row * width + place, mask=place < width, other=0)
    end = tl.arange(0, ENDS)
    known = tl.load(ends + row * num_ends + end, mask=end < num_ends, other=0)
    is_end = tl.max(((new[:, None] == known[None, :]) & (end < num_ends)[None, :]).to(tl.int32), 1) > 0
    first_end = tl.min(tl.where(is_end & (place < width), place, width), 0)
    count = tl.load(counts + row)
    takes_part = lives & (count >= 0)
    kept = tl.minimum(count + 1, limit - length)
    ended = takes_part & (first_end < kept)
    kept = tl.where(takes_part, tl.where(ended, first_end + 1, kept), 0)
    tl.debug_barrier()  # all threads have read what is overwritten now
    tl.store(tokens + row.to(tl.int64) * capacity + length + place, new, mask=place < kept)
    tl.store(lengths + row, length + kept)
    tl.store(alive + row, (lives & (ended == 0) & (length + kept < limit)).to(tl.uint8))


def launch_append(tokens: Tensor, lengths: Tensor, limits: Tensor, alive: Tensor, emitted: Tensor, counts: Tensor,
                  ends: Tensor) -> None:  # fmt: skip
    """See `specdec.requests.rows.append_reference`."""
    capacity, width, num_ends = tokens.shape[1], emitted.shape[1], ends.shape[1]
    blocks = triton.next_power_of_2(width), triton.next_power_of_2(max(1, num_ends))
    _append_kernel[(len(lengths),)](
        tokens, lengths, limits, alive.view(torch.uint8), emitted.contiguous(), counts.contiguous(),
        ends, capacity, width, num_ends, *blocks, num_warps=1, **overlapping(tokens.device),
    )  # fmt: skip
