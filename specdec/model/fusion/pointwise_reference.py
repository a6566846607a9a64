"""Norms, rotations and gates in plain PyTorch: the specification of `pointwise_kernel`.

Without kernels, these functions show which modules would be recognised."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """RMS norm of `x [..., width]` with `weight [width]`; with `offset` the weight is 1 + `weight`, all in float32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1 + weight.float())).to(x.dtype) if offset else normed.to(x.dtype) * weight


def rms_norms(x: Tensor, x_weight: Tensor, x_eps: float, y: Tensor, y_weight: Tensor, y_eps: float) -> Tensor:
    """`rms_norm`, without offset, of `x [T, w]` and of `y [T, v]` side by side, `[T, w + v]`."""
    return torch.cat([rms_norm(x, x_weight, x_eps, False), rms_norm(y, y_weight, y_eps, False)], -1)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of `q [1, H, T, D]` and `k [1, G, T, D]` by `cos` and `sin` `[1, T, D]`.

    Element i of a head is paired with element i + D / 2."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return rotated(q), rotated(k)


def gate(both: Tensor, activation: str) -> Tensor:
    """`both [..., 2 I]` -> activation(first half) * second half, `[..., I]`; `activation` is a key of ACTIVATIONS."""
    first, second = both.chunk(2, -1)
    return ACTIVATIONS[activation](first) * second
