"""Norms and gated products that keep only what they read for their gradients, and compute the rest again.

A drafter that learns several steps of drafting at once holds what each step keeps, which decides how many tokens fit.
Products of matrices are never computed twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that products with `weight` are computed in: autocast's where it is on."""
    kind = weight.device.type
    low = weight.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if low else weight.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in float32 at least, in the dtype of `x`; `x [..., size]`, `weight [size]`."""
    return _RMSNorm.apply(x, weight, eps) if _learns(x, weight) else _normed(x, eps)[0].to(x.dtype) * weight.to(x.dtype)


def gated_product(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up; `activation` works on each number alone."""
    own = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    return _GatedProduct.apply(activation, gate, up) if _learns(gate, up) and not own else activation(gate) * up


@contextmanager
def computed_again(value: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """What is run inside does not keep `value` for its gradients, but calls `compute` for it when they are drawn."""
    kept, shape = value.data_ptr(), value.shape

    def pack(tensor: Tensor) -> Any:
        return compute if tensor.data_ptr() == kept and tensor.shape == shape else tensor

    def unpack(held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        with torch.no_grad():
            return held()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x)` and `1 / rms(x) [..., 1]`, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale, scale


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x) and g = dy * weight: dx = (g - n mean(g n)) / rms(x), dweight = sum over rows of dy n."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed.to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output: Tensor):
        x, weight, scale = ctx.saved_tensors
        wide = by_output.to(scale.dtype)
        normed, by_x, by_weight = x.to(scale.dtype) * scale, None, None
        if ctx.needs_input_grad[1]:
            by_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            wide = wide * weight
            by_x = wide.sub_(normed.mul_((wide * normed).mean(-1, keepdim=True))).mul_(scale).to(x.dtype)
        return by_x, by_weight, None


class _GatedProduct(torch.autograd.Function):
    """The activation's derivative is torch's own."""

    @staticmethod
    def forward(ctx, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output: Tensor):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.activation(gate)
        (by_gate,) = torch.autograd.grad(active, gate, by_output * up)
        return None, by_gate, by_output * active.detach()
