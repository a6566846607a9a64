"""`specdec.acceptance.greedy.accept_likely` as one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping


@triton.jit
def _follow_kernel(
    tokens, likely, parent, path, depth, valid, counts, accepted, following, emitted, size, deepest,
    parent_row, path_row, depth_row, valid_row, SIZE: tl.constexpr, PATH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row; a table with row stride 0 is shared by all rows."""
    await_input(OVERLAP)
    row, node, place = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE), tl.arange(0, PATH)
    tokens, likely, inside = tokens + row * size, likely + row * size, node < size
    parent, path = parent + row * parent_row, path + row * path_row
    depth, valid = depth + row * depth_row, valid + row * valid_row
    level = tl.load(depth + node, mask=inside, other=0)
    kept = inside & (tl.load(valid + node, mask=inside, other=0) > 0)
    for above in range(deepest):
        on_path = tl.load(path + node * deepest + above, mask=inside, other=0)
        right = tl.load(tokens + on_path, mask=inside, other=0) == tl.load(
            likely + tl.load(parent + on_path, mask=inside, other=0), mask=inside, other=0
        )
        right = right & (tl.load(valid + on_path, mask=inside, other=0) > 0)
        kept = kept & ((above >= level) | right)
    level = tl.where(kept, level, -1)
    end = tl.min(tl.where(level == tl.max(level, 0), node, SIZE), 0)
    count, after = tl.load(depth + end), tl.load(likely + end)
    passed = tl.load(path + end * deepest + place, mask=place < deepest, other=0)
    drafted = tl.load(tokens + passed, mask=place < deepest, other=0)
    tl.store(counts + row, count)
    tl.store(following + row, after)
    tl.store(accepted + row * deepest + place, passed, mask=place < deepest)
    tl.store(emitted + row * (deepest + 1) + place, tl.where(place < count, drafted, after), mask=place <= deepest)


def launch_follow(tokens: Tensor, likely: Tensor, parent: Tensor, path: Tensor, depth: Tensor,
                  valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `accept_likely` -> counts `[B]`, path `[B, E]`, next tokens `[B]`, emitted tokens `[B, E + 1]`.

    tokens, likely [B, N]
    parent, path, depth, valid: tables of `TreeTensors`
    """
    (rows, size), deepest = tokens.shape, path.shape[2]
    tables = [parent, path, depth, valid.view(torch.uint8)]
    tables = [table if table[0].is_contiguous() else table.contiguous() for table in tables]
    counts, accepted = tokens.new_empty(rows), tokens.new_empty(rows, deepest)
    following, emitted = tokens.new_empty(rows), tokens.new_empty(rows, deepest + 1)
    strides = [0 if len(table) == 1 else table.stride(0) for table in tables]
    block = triton.next_power_of_2(size)
    _follow_kernel[(rows,)](
        tokens.contiguous(), likely.contiguous(), *tables, counts, accepted, following, emitted, size, deepest,
        *strides, block, triton.next_power_of_2(deepest + 1), num_warps=min(4, max(1, block // 64)),
        **overlapping(tokens.device),
    )  # fmt: skip
    return counts, accepted, following, emitted
