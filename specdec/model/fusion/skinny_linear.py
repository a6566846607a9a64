"""Linear layers for few rows (GEMV, small-M GEMM): a decoding step has one row, a verification a handful.

Their time is that of reading the weights, which kernels made for few rows do faster than those for many."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention.dispatch import resolve
from attention.recording import native_sink
from specdec.model.fusion import native
from specdec.model.fusion.product_inputs import Norm, misfit
from specdec.model.fusion.quantised.linear import quantised_linear, quantised_linear_and_norm
from specdec.model.fusion.quantised.packed import PackedWeight


def skinny_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    impl: str | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """`x [..., in]` @ `weight [out, in]`.T + `bias [out]` + `added [..., out]` -> `[..., out]`.

    Equals `torch.nn.functional.linear` and a sum up to rounding. `impl=None` means "triton" for 1 to MAX_ROWS rows of
    16-bit numbers on a GPU without gradients, else "reference", which is PyTorch, or a kernel in C where these are
    wanted (`native_sink`). Weights in 8 or 4 bits go to `quantised_linear`. Raises ValueError for a named `impl` that
    cannot run.

    >>> skinny_linear(torch.ones(1, 3), torch.eye(3))
    tensor([[1., 1., 1.]])
    """
    if not isinstance(weight, Tensor):
        return quantised_linear(x, weight, bias, added, impl)
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


def skinny_linear_and_norm(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, added: Tensor | None,
                           norm: Norm, impl: str | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`skinny_linear` and its `norm`, where one kernel computes both without another launch; else None for the norm."""
    if not isinstance(weight, Tensor):
        return quantised_linear_and_norm(x, weight, bias, added, norm, impl)
    if resolve(impl, x.device, lambda: _fallback_reason(x, weight, bias, added)) == "reference":
        return skinny_linear(x, weight, bias, impl, added), None
    from specdec.model.fusion.skinny_linear_kernel import launch_skinny_linear

    return launch_skinny_linear(x, weight, bias, added, norm)


def _fallback_reason(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> str | None:
    """Why the kernel cannot compute a product; None if it can."""
    if weight.dtype != x.dtype:
        return f"it takes rows and weights of one 16-bit type, got {x.dtype}, {weight.dtype}"
    if (why := misfit(x, weight.shape, bias, added)) is not None:
        return why
    if weight.device != x.device:
        return f"its tensors are on {x.device}, {weight.device}"
    if weight.stride(1) != 1:
        return f"each row of its weights must be contiguous, got strides {weight.stride()}"
    if torch.is_grad_enabled() and weight.requires_grad:
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
