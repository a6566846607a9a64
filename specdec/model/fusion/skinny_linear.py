"""Linear layers for few rows (GEMV, small-M GEMM): a decoding step has one row, a verification a handful.

Their time is that of reading the weights, which kernels made for few rows do faster than those for many."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention.dispatch import resolve
from attention.recording import native_sink
from specdec.model.fusion import native

MAX_ROWS = 64  # for more rows cuBLAS is as fast on an H200


class Norm(NamedTuple):
    """An RMS norm x / sqrt(mean(x²) + `eps`) * `weight`; with `offset` the weight is 1 + `weight`."""

    weight: Tensor
    eps: float
    offset: bool


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str | None = None, added: Tensor | None = None
) -> Tensor:
    """`x [..., in]` @ `weight [out, in]`.T + `bias [out]` + `added [..., out]` -> `[..., out]`.

    Equals `torch.nn.functional.linear` and a sum up to rounding. `impl=None` means "triton" for 1 to MAX_ROWS rows of
    16-bit numbers on a GPU without gradients, else "reference", which is PyTorch, or a kernel in C where these are
    wanted (`native_sink`). Raises ValueError for a named `impl` that cannot run.

    >>> skinny_linear(torch.ones(1, 3), torch.eye(3))
    tensor([[1., 1., 1.]])
    """
    if resolve(impl, x.device, lambda: _fallback_reason(x, weight, bias, added)) == "reference":
        sink = native_sink() if impl is None else None
        product = None if sink is None else native.linear(sink, x, [weight], [bias])
        product = nn.functional.linear(x, weight, bias) if product is None else product
        return product if added is None else product + added
    return torch.ops.specdec.skinny_linear(x, weight, bias, added)


def skinny_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """`skinny_linear` of the same rows and each of `weights`, side by side: `[..., sum of out]`."""
    if (sink := native_sink()) is not None and (products := native.linear(sink, x, weights, biases)) is not None:
        return products
    return torch.cat([skinny_linear(x, *pair) for pair in zip(weights, biases, strict=True)], -1)


def skinny_linear_and_norm(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, norm: Norm,
                             impl: str | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`skinny_linear` and its `norm`, where one kernel computes both without another launch; else None for the norm."""
    if resolve(impl, x.device, lambda: _fallback_reason(x, weight, bias, added)) == "reference":
        return skinny_linear(x, weight, bias, impl, added), None
    from specdec.model.fusion.skinny_linear_kernel import launch_skinny_linear

    return launch_skinny_linear(x, weight, bias, added, norm)


def _fallback_reason(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> str | None:
    """Why the kernel cannot compute a product; None if it can."""
    given = [t for t in (x, weight, bias, added) if t is not None]
    if x.dtype not in (torch.bfloat16, torch.float16) or any(t.dtype != x.dtype for t in given):
        return f"it takes rows and weights of one 16-bit type, got {', '.join(str(t.dtype) for t in given)}"
    if x.shape[-1:] != weight.shape[1:] or bias is not None and (bias.shape != weight.shape[:1] or bias.stride(0) != 1):
        return (
            f"shapes must fit, and a bias be contiguous, got {list(x.shape)}, {list(weight.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    if added is not None and added.shape != (*x.shape[:-1], len(weight)):
        return f"what is added must have the product's shape {[*x.shape[:-1], len(weight)]}, got {list(added.shape)}"
    if any(t.device != x.device for t in given):
        return f"its tensors are on {', '.join(str(t.device) for t in given)}"
    if not 0 < x.numel() <= MAX_ROWS * weight.shape[1]:
        return f"it takes 1 to {MAX_ROWS} rows, got {list(x.shape)}"
    if weight.stride(1) != 1:
        return f"each row of its weights must be contiguous, got strides {weight.stride()}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "it has no backward, and a gradient is wanted"
    return None


def _skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
    from specdec.model.fusion.skinny_linear_kernel import launch_skinny_linear

    return launch_skinny_linear(x, weight, bias, added)[0]


torch.library.define("specdec::skinny_linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor? added) -> Tensor")
torch.library.impl("specdec::skinny_linear", "CompositeExplicitAutograd", _skinny_linear)
torch.library.register_fake(
    "specdec::skinny_linear", lambda x, weight, bias, added: x.new_empty(*x.shape[:-1], weight.shape[0])
)
