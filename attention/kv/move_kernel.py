"""Triton kernel of `attention.kv.move`.

One program owns a block of columns of one tensor in one layer and walks one segment, a few moves at a time: it reads
all their rows, waits until every thread has, and writes them. Reading before writing is all the order that a segment
needs (see `attention.kv.move`), and it keeps several rows in flight where one move after the other would pay the
memory's latency each time."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _move_block(base, layer, block, layer_stride, row_stride, sources, targets, begin, end,
                WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    columns = block * BLOCK + tl.arange(0, BLOCK)
    base += layer.to(tl.int64) * layer_stride + columns[None, :]
    for first in range(begin, end, ROWS):
        move = first + tl.arange(0, ROWS)
        source = tl.load(sources + move, mask=move < end, other=-1).to(tl.int64)
        target = tl.load(targets + move, mask=move < end, other=-1).to(tl.int64)
        moves = (source >= 0) & (target >= 0) & (source != target)
        mask = moves[:, None] & (columns < WIDTH)[None, :]
        held = tl.load(base + source[:, None] * row_stride, mask=mask)
        tl.debug_barrier()  # a target may be the source of an earlier move, which another thread reads
        tl.store(base + target[:, None] * row_stride, held, mask=mask)


# the three are views into one tensor, so their alignment varies
@triton.jit(do_not_specialize_on_alignment=["sources", "targets", "cu_moves"])
def _move_kernel(a, b, c, d, a_layer, b_layer, c_layer, d_layer, a_row, b_row, c_row, d_row, sources, targets, cu_moves,
                 A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
                 BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Tensors a … d are A … D words wide, 0 for none; their column blocks follow each other on the grid's last axis."""
    segment, layer, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(cu_moves + segment), tl.load(cu_moves + segment + 1)
    to_b: tl.constexpr = (A + BLOCK - 1) // BLOCK
    to_c: tl.constexpr = to_b + (B + BLOCK - 1) // BLOCK
    to_d: tl.constexpr = to_c + (C + BLOCK - 1) // BLOCK
    if block < to_b:
        _move_block(a, layer, block, a_layer, a_row, sources, targets, begin, end, A, BLOCK, ROWS)
    elif block < to_c:
        _move_block(b, layer, block - to_b, b_layer, b_row, sources, targets, begin, end, B, BLOCK, ROWS)
    elif block < to_d:
        _move_block(c, layer, block - to_c, c_layer, c_row, sources, targets, begin, end, C, BLOCK, ROWS)
    else:
        _move_block(d, layer, block - to_d, d_layer, d_row, sources, targets, begin, end, D, BLOCK, ROWS)


def pick_config(widest: int, moves: int, segments: int) -> dict:
    """Launch settings for rows of at most `widest` 32-bit words: 16 bytes a thread, page copies one at a time."""
    block = min(1024, triton.next_power_of_2(widest))
    return dict(BLOCK=block, ROWS=1 if moves <= segments else 8, num_warps=min(8, max(1, block // 128)))


def launch_move_rows(tensors: list[Tensor], sources: Tensor, targets: Tensor, cu_moves: Tensor) -> None:
    """Run `attention.kv.move.move_rows` on one to four integer tensors `[layers, rows, width]`."""
    segments, layers = len(cu_moves) - 1, tensors[0].shape[0]
    if segments == 0 or len(sources) == 0:
        return
    missing = 4 - len(tensors)
    widths = [t.shape[2] for t in tensors]
    config = pick_config(max(widths), len(sources), segments)
    blocks = sum(-(-width // config["BLOCK"]) for width in widths)
    _move_kernel[(segments, layers, blocks)](
        *tensors, *[tensors[0]] * missing,
        *[t.stride(0) for t in tensors], *[0] * missing,
        *[t.stride(1) for t in tensors], *[0] * missing,
        sources, targets, cu_moves, *widths, *[0] * missing, **config,
    )  # fmt: skip
