"""The best children of a level's nodes, named and in order, by one program for each row of the batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.scores_kernel import of_key, order_key


@triton.jit
def _level_kernel(
    value, value_stride, likely, columns, spread, among, among_stride, ids, deepest, level, found, above, tokens,
    values, size, keep,
    CHILDREN: tl.constexpr, AMONG: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: sort its candidates by value, then place, and store the first `keep` of them."""
    await_input(OVERLAP)
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    node = place // CHILDREN
    there = place < size
    of_node = row * found + tl.where(spread != 0, node * CHILDREN, 0) + place % CHILDREN
    gained = tl.load(value + row * value_stride + node, mask=there, other=float("-inf"))
    gained += tl.load(likely + of_node, mask=there, other=float("-inf"))
    key = order_key(tl.where(there, gained, float("-inf")), 0).to(tl.int64)
    key = tl.where(there, key * 4294967296 + (BLOCK - 1 - place), -9223372036854775807)
    key = tl.sort(key, descending=True)
    chosen = BLOCK - 1 - (key & 4294967295).to(tl.int32)
    kept = of_key((key >> 32).to(tl.int32), 0)
    kept = tl.where(tl.load(deepest + row) <= level, float("-inf"), kept)
    node, stored = chosen // CHILDREN, place < keep
    of_node = row * found + tl.where(spread != 0, node * CHILDREN, 0) + chosen % CHILDREN
    token = tl.load(columns + of_node, mask=stored, other=0)
    if AMONG:
        token = tl.load(among + row * among_stride + token, mask=stored, other=0)
    if IDS:
        token = tl.load(ids + token, mask=stored, other=0)
    out = row * keep + place
    tl.store(tokens + out, token, mask=stored)
    tl.store(values + out, kept, mask=stored)
    tl.store(above + out, node.to(tl.int64), mask=stored)


def launch_level(value: Tensor, likely: Tensor, columns: Tensor, keep: int, deepest: Tensor, level: int,
                 among: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `best_first.best_children`; values are float32."""
    (rows, nodes), children, device = value.shape, likely.shape[2], value.device
    size, found = nodes * children, likely[0].numel()
    make = lambda dtype: torch.empty(rows, keep, dtype=dtype, device=device)
    tokens, values, above = make(torch.int64), make(torch.float32), make(torch.int64)
    value = value if value.stride(1) == 1 else value.contiguous()
    among = among if among is None or among.stride(1) == 1 else among.contiguous()
    block = triton.next_power_of_2(max(2, size))
    _level_kernel[(rows,)](
        value, value.stride(0), likely.contiguous(), columns.contiguous(), int(likely.shape[1] > 1),
        columns if among is None else among, 0 if among is None else among.stride(0), columns if ids is None else ids,
        deepest, level, found, above, tokens, values, size, keep,
        children, among is not None, ids is not None, block, num_warps=min(16, max(1, block // 128)),
        **overlapping(device),
    )  # fmt: skip
    return tokens, values, above
