"""Norms, rotations and gates on a CPU, in as few PyTorch operations as they take: there, an operation costs more than
what it computes. Equal to `pointwise_reference` up to rounding. Where kernels in C are wanted, those run."""

import torch
from torch import Tensor

from attention.recording import native_sink
from specdec.model.fusion import native
from specdec.model.fusion.pointwise_reference import ACTIVATIONS


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """RMS norm of `x [..., width]` with `weight [width]`; with `offset` the weight is 1 + `weight`, all in float32.

    The mean of the squares, eps included, is a batch of matrix products of a row with itself."""
    if (sink := native_sink()) and (normed := native.rms_norm(sink, x, weight, eps, offset)) is not None:
        return normed
    wide = x.float().reshape(-1, 1, x.shape[-1])
    start = wide.new_full((len(wide), 1, 1), eps)
    scale = torch.baddbmm(start, wide, wide.transpose(1, 2), alpha=1 / x.shape[-1]).rsqrt_()
    normed = (wide * scale).view(x.shape)
    return (normed * (1 + weight.float())).to(x.dtype) if offset else normed.to(x.dtype) * weight


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of `q [1, H, T, D]` and `k [1, G, T, D]` by `cos` and `sin` `[1, T, D]`.

    Both at once where a joined projection has laid the keys' heads behind the queries'."""
    heads, groups = q.shape[1], k.shape[1]
    behind = q.storage_offset() + heads * q.stride(1)
    if q.stride() == k.stride() and k.storage_offset() == behind and _share_memory(q, k):
        both = q.as_strided((1, heads + groups, *q.shape[2:]), q.stride())
        return _rotated(both, cos, sin).split([heads, groups], 1)  # type: ignore[return-value]
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _share_memory(q: Tensor, k: Tensor) -> bool:
    return q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if (sink := native_sink()) and (rotated := native.rotate(sink, x, cos, sin)) is not None:
        return rotated
    half, cos, sin = x.shape[-1] // 2, cos[:, None], sin[:, None]
    out = torch.mul(x, cos, out=x.new_empty(x.shape))  # head by head, as attention reads it
    first, second = out[..., :half], out[..., half:]
    first.addcmul_(x[..., half:], sin[..., :half], value=-1)
    second.addcmul_(x[..., :half], sin[..., half:])
    return out


def gate(both: Tensor, activation: str) -> Tensor:
    """`both [..., 2 I]` -> activation(first half) * second half, `[..., I]`; `activation` is a key of ACTIVATIONS."""
    if (sink := native_sink()) and (gated := native.gate(sink, both, activation)) is not None:
        return gated
    first, second = both.chunk(2, -1)
    return ACTIVATIONS[activation](first) * second
