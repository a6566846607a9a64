"""Triton kernels for norms, rotations and gates; `pointwise_reference` specifies them, `pointwise` puts them in place.

Intermediate results are rounded to the tensors' dtype wherever transformers rounds them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping


@triton.jit
def normalised(value, weight, width, eps, OFFSET: tl.constexpr):
    """RMS norm of one row, whose elements past `width` are zero."""
    wide, w = value.to(tl.float32), weight.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    result = wide * (1.0 + w) if OFFSET else wide.to(value.dtype).to(tl.float32) * w
    return result.to(value.dtype)


@triton.jit
def _norm_kernel(x, weight, out, inner, outer_stride, inner_stride, width, eps, OFFSET: tl.constexpr,
                 BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    await_input(OVERLAP, True)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + (row // inner) * outer_stride + (row % inner) * inner_stride + column, mask=inside, other=0.0)
    result = normalised(value, tl.load(weight + column, mask=inside, other=0.0), width, eps, OFFSET)
    tl.store(out + row * width + column, result, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """RMS norm of `x [..., width]` with `weight [width]`; with `offset` the weight is 1 + `weight`, all in float32."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    width, rows = x.shape[-1], x[..., 0]  # the first element of each row, for its strides
    strides: tuple[int, ...]
    if rows.numel() == rows.shape[-1]:  # [1, T]
        inner, strides = 1, (rows.stride(-1), 0)
    elif rows.ndim > 1 and rows.numel() == rows.shape[-2] * rows.shape[-1]:  # [1, T, heads]
        inner, strides = rows.shape[-1], rows.stride()[-2:]
    else:
        x = x.contiguous()
        inner, strides = 1, (width, 0)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _norm_kernel[(rows.numel(),)](
            x, weight, out, inner, *strides, width, eps, offset, **one_row(width), **overlapping(x.device)
        )
    return out


@triton.jit
def _norms_kernel(x, x_weight, y, y_weight, out, x_row, y_row, x_width, y_width, x_eps, y_eps, BLOCK: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    """A row of `x` or of `y`, whose norms lie side by side."""
    await_input(OVERLAP, True)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    out += row * (x_width + y_width)
    if tl.program_id(1) == 0:
        inside = column < x_width
        value = tl.load(x + row * x_row + column, mask=inside, other=0.0)
        result = normalised(value, tl.load(x_weight + column, mask=inside, other=0.0), x_width, x_eps, False)
        tl.store(out + column, result, mask=inside)
    else:
        inside = column < y_width
        value = tl.load(y + row * y_row + column, mask=inside, other=0.0)
        result = normalised(value, tl.load(y_weight + column, mask=inside, other=0.0), y_width, y_eps, False)
        tl.store(out + x_width + column, result, mask=inside)


def rms_norms(x: Tensor, x_weight: Tensor, x_eps: float, y: Tensor, y_weight: Tensor, y_eps: float) -> Tensor:
    """`rms_norm`, without offset, of `x [T, w]` and of `y [T, v]` side by side, `[T, w + v]`."""
    x, y = (each if each.stride(1) == 1 else each.contiguous() for each in (x, y))
    out = x.new_empty(len(x), x.shape[1] + y.shape[1])
    if out.numel():
        _norms_kernel[(len(x), 2)](
            x, x_weight, y, y_weight, out, x.stride(0), y.stride(0), x.shape[1], y.shape[1], x_eps, y_eps,
            **one_row(max(x.shape[1], y.shape[1])), **overlapping(x.device),
        )  # fmt: skip
    return out


def one_row(width: int) -> dict:
    """Launch settings for a program that holds a whole row."""
    block = triton.next_power_of_2(width)
    return dict(BLOCK=block, num_warps=min(8, max(1, block // 512)))


@triton.jit
def _rotate_heads(
    source, target, head_stride, first, heads, cos, sin, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Heads `first` to first + ROWS - 1, of `heads`, of one token."""
    head, column = first + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    width = column < HALF
    inside = (head < heads)[:, None] & width[None, :]
    source += head[:, None] * head_stride + column[None, :]
    target += head[:, None] * (2 * HALF) + column[None, :]
    first_half, second_half = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    dtype = first_half.dtype
    for half in tl.static_range(2):
        if half == 0:
            mine, other = first_half, -second_half
        else:
            mine, other = second_half, first_half
        straight = (
            mine.to(tl.float32) * tl.load(cos + half * HALF + column, mask=width, other=0.0).to(tl.float32)[None, :]
        )
        across = (
            other.to(tl.float32) * tl.load(sin + half * HALF + column, mask=width, other=0.0).to(tl.float32)[None, :]
        )
        rotated = straight.to(dtype).to(tl.float32) + across.to(dtype).to(tl.float32)
        tl.store(target + half * HALF, rotated.to(dtype), mask=inside)


@triton.jit
def _rotate_kernel(q, k, cos, sin, q_out, k_out, q_head, q_token, k_head, k_token, cos_token, sin_token,
                   heads, groups, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   OVERLAP: tl.constexpr):  # fmt: skip
    """Each program rotates ROWS heads of one token; the programs for `q` are followed by those for `k`."""
    await_input(OVERLAP, True)
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * ROWS
    cos += token * cos_token
    sin += token * sin_token
    q_heads = tl.cdiv(heads, ROWS) * ROWS  # rounded up to whole programs
    if first < heads:
        _rotate_heads(
            q + token * q_token, q_out + token * heads * 2 * HALF, q_head, first, heads, cos, sin, HALF, ROWS, BLOCK
        )
    else:
        _rotate_heads(k + token * k_token, k_out + token * groups * 2 * HALF, k_head, first - q_heads,
                      groups, cos, sin, HALF, ROWS, BLOCK)  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of `q [1, H, T, D]` and `k [1, G, T, D]` by `cos` and `sin` `[1, T, D]`, all with stride 1 in D.

    Element i is paired with i + D / 2. Products are rounded before they are added, as in PyTorch."""
    (_, heads, tokens, dim), groups = q.shape, k.shape[1]
    q_out, k_out = q.new_empty(1, tokens, heads, dim), q.new_empty(1, tokens, groups, dim)
    if tokens:
        rows, block = 8, triton.next_power_of_2(dim // 2)
        _rotate_kernel[(tokens, triton.cdiv(heads, rows) + triton.cdiv(groups, rows))](
            q, k, cos, sin, q_out, k_out, *q.stride()[1:3], *k.stride()[1:3], cos.stride(1), sin.stride(1),
            heads, groups, dim // 2, rows, block, num_warps=max(1, rows * block // 256),
            enable_fp_fusion=False, **overlapping(q.device))  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


@triton.jit
def _gate_kernel(both, out, width, TANH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    await_input(OVERLAP)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(both + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(both + row * 2 * width + width + column, mask=inside, other=0.0)
    x = gate.to(tl.float32)
    # x sigmoid(z); the tanh of GELU is 2 sigmoid(2 z) - 1
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x) if TANH else x
    active = (x / (1.0 + tl.exp(-z))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + column, (active * up.to(tl.float32)).to(gate.dtype), mask=inside)


def gate(both: Tensor, activation: str) -> Tensor:
    """Contiguous `both [..., 2 I]` -> activation(first half) * second half, `[..., I]`; "silu" or "gelu_tanh"."""
    width, block = both.shape[-1] // 2, 1024
    out = both.new_empty(*both.shape[:-1], width)
    if out.numel():
        _gate_kernel[(out.numel() // width, triton.cdiv(width, block))](
            both, out, width, activation == "gelu_tanh", block, num_warps=4, **overlapping(both.device)
        )
    return out
