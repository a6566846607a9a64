"""The small operations between products in plain PyTorch: the specification of `pointwise_kernel`, and what modules are
recognised by where there are no kernels."""

from functools import partial

import torch
from torch import Tensor, nn

ACTIVATIONS = {"silu": nn.functional.silu, "gelu_tanh": partial(nn.functional.gelu, approximate="tanh")}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """`x [..., width]` over the root of its mean square, times `weight [width]`, or with `offset` times 1 + weight,
    then in float32 throughout.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1 + weight.float())).to(x.dtype) if offset else normed.to(x.dtype) * weight


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of `q [1, H, T, D]` and `k [1, G, T, D]` by `cos` and `sin` `[1, T, D]`, in halves."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return turned(q), turned(k)


def gate(both: Tensor, activation: str) -> Tensor:
    """`both [..., 2 I]` -> activation of the first half times the second, `[..., I]`; `activation` is "silu" or
    "gelu_tanh".
    """
    first, second = both.chunk(2, -1)
    return ACTIVATIONS[activation](first) * second
