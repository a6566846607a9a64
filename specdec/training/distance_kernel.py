"""How far a drafter's distributions are from a teacher's, by a Triton kernel that reads the logits of both as they are.

One program takes a row: it finds both normalisers in one pass, the loss in a second, in which the divergence also
writes its gradient over the logits, and the total variation's gradient in a third. Nothing in float32 reaches memory
but a loss a row. The reference is `specdec.training.linear_loss`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.gpu import on

BLOCK = 4096  # logits of a row that a program reads at a time


@triton.jit
def _add_up(most, total, x):
    """The largest number so far, and the sum of exp(number - it)."""
    new = tl.maximum(most, tl.max(x, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(most - shift) + tl.sum(tl.exp(x - shift), 0)


@triton.jit
def _distance_kernel(logits, teacher, rows, losses, size, stride, teacher_stride,
                     INDEXED: tl.constexpr, TV: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The loss of row `program_id(0)`, whose teacher is row `rows` of the teacher's logits; `logits` get its slope."""
    row = tl.program_id(0).to(tl.int64)
    other = tl.load(rows + row).to(tl.int64) if INDEXED else row
    q_row, p_row, lanes = logits + row * stride, teacher + other * teacher_stride, tl.arange(0, BLOCK)
    q_most, q_total, p_most, p_total = float("-inf"), 0.0, float("-inf"), 0.0
    for start in range(0, size, BLOCK):
        there = start + lanes < size
        q = tl.load(q_row + start + lanes, mask=there, other=float("-inf")).to(tl.float32)
        p = tl.load(p_row + start + lanes, mask=there, other=float("-inf")).to(tl.float32)
        q_most, q_total = _add_up(q_most, q_total, q)
        p_most, p_total = _add_up(p_most, p_total, p)
    q_shift, p_shift = q_most + tl.log(q_total), p_most + tl.log(p_total)

    loss, signed = 0.0, 0.0
    for start in range(0, size, BLOCK):
        there = start + lanes < size
        log_q = tl.load(q_row + start + lanes, mask=there, other=0.0).to(tl.float32) - q_shift
        log_p = tl.load(p_row + start + lanes, mask=there, other=0.0).to(tl.float32) - p_shift
        q, p = tl.where(there, tl.exp(log_q), 0.0), tl.where(there, tl.exp(log_p), 0.0)
        if TV:
            loss += tl.sum(tl.abs(q - p), 0) / 2
            signed += tl.sum(tl.where(q > p, q, 0.0) - tl.where(q < p, q, 0.0), 0) / 2
        else:
            loss += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 0)
            tl.store(q_row + start + lanes, (q - p).to(logits.dtype.element_ty), mask=there)
    tl.store(losses + row, loss)
    if TV:
        for start in range(0, size, BLOCK):
            there = start + lanes < size
            log_q = tl.load(q_row + start + lanes, mask=there, other=0.0).to(tl.float32) - q_shift
            log_p = tl.load(p_row + start + lanes, mask=there, other=0.0).to(tl.float32) - p_shift
            q, p = tl.exp(log_q), tl.exp(log_p)
            sign = tl.where(q > p, 0.5, 0.0) - tl.where(q < p, 0.5, 0.0)
            tl.store(q_row + start + lanes, ((sign - signed) * q).to(logits.dtype.element_ty), mask=there)


def launch_distance(logits: Tensor, teacher: Tensor, rows: Tensor | None, kind: str) -> Tensor:
    """The "kl" or "tv" of each row, float32 `[m]`; `logits [m, V]` are overwritten with its gradient.

    teacher `[u, V]`; rows int32 `[m]`: which of the teacher's each row has (None: its own)."""
    count, size = logits.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    losses = logits.new_empty(count, dtype=torch.float32)
    with on(logits.device):
        _distance_kernel[(count,)](
            logits, teacher, losses if rows is None else rows, losses, size, logits.stride(0), teacher.stride(0),
            rows is not None, kind == "tv", min(BLOCK, triton.next_power_of_2(size)), num_warps=8,
        )  # fmt: skip
    return losses
