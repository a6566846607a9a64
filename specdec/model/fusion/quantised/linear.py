"""Products of few rows with weights in 8 or 4 bits; the counterpart of `specdec.model.fusion.skinny_linear`.

The reference dequantises the whole matrix, rounds it to the rows' type and multiplies by PyTorch, which adds up in
float32. The kernels read the packed numbers and round once, at the end: they are the more exact of the two."""

import torch
from torch import Tensor, nn

from attention.dispatch import resolve
from attention.recording import as_one
from specdec.model.fusion.product_inputs import Norm, misfit
from specdec.model.fusion.quantised.packed import (
    FORMATS,
    KERNEL_SPAN,
    LEAST_UNIT,
    SIXTEEN_BITS,
    EightBitWeight,
    Int4Weight,
    PackedWeight,
    span_of,
)


def quantised_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, added: Tensor | None = None,
                     impl: str | None = None) -> Tensor:  # fmt: skip
    """`x [..., in]` @ `weight [out, in]`.T + `bias [out]` + `added [..., out]` -> `[..., out]`.

    Equals `torch.nn.functional.linear` with `weight.dequantise(x.dtype)` and a sum up to rounding. `impl=None` means
    "triton" for 1 to 64 rows of 16-bit numbers on a GPU without gradients, else "reference", which makes a
    dequantised copy for the call (`matrix_of`). Raises ValueError for a named `impl` that cannot run.

    >>> weight = EightBitWeight(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([[0.5]]), 1, 2)
    >>> quantised_linear(torch.tensor([[4.0, 1.0]]), weight)
    tensor([[1.]])
    """
    if resolve(impl, x.device, lambda: _fallback_reason(x, weight, bias, added)) == "reference":
        # one operation of a recording, which would keep the matrix
        (product,) = as_one(lambda x: [nn.functional.linear(x, matrix_of(weight, x.dtype, impl), bias)], x)
        return product if added is None else product + added
    return torch.ops.specdec.quantised_linear(x, *_operands(weight), bias, added)


def quantised_linear_and_norm(x: Tensor, weight: PackedWeight, bias: Tensor | None, added: Tensor | None, norm: Norm,
                              impl: str | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`quantised_linear` and its `norm`, where one kernel computes both without another launch; else None for it."""
    if resolve(impl, x.device, lambda: _fallback_reason(x, weight, bias, added)) == "reference":
        return quantised_linear(x, weight, bias, added, impl), None
    from specdec.model.fusion.quantised.linear_kernel import launch_quantised_linear

    return launch_quantised_linear(x, *_operands(weight), bias, added, norm)


def matrix_of(weight: PackedWeight, dtype: torch.dtype, impl: str | None = None) -> Tensor:
    """The matrix `[out, in]` that a packed weight stands for, as `weight.dequantise(dtype)` computes it.

    impl: "triton" reads and writes it once; it computes 16-bit types on a GPU. None: that one where it can."""
    device = weight.values.device
    no_kernel = None if dtype in SIXTEEN_BITS else f"the kernel writes 16-bit numbers, got {dtype}"
    if no_kernel is None and weight.values.stride(1) != 1:
        no_kernel = f"an output's numbers must be contiguous, got strides {weight.values.stride()}"
    if resolve(impl, device, lambda: no_kernel) == "reference":
        return weight.dequantise(dtype)
    return torch.ops.specdec.dequantise(*_operands(weight), dtype)


def _operands(weight: PackedWeight) -> tuple[Tensor, Tensor, str, int, int]:
    """A weight as kernels take it, with how they read it: a key of `linear_kernel.LAYOUTS`."""
    layout = weight.kind if isinstance(weight, Int4Weight) else FORMATS[weight.values.dtype]
    return weight.values, weight.scales, layout, weight.group, weight.tall


def _fallback_reason(x: Tensor, weight: PackedWeight, bias: Tensor | None, added: Tensor | None) -> str | None:
    """Why the kernel cannot compute a product; None if it can."""
    inner, group = weight.shape[1], weight.group
    if (why := misfit(x, weight.shape, bias, added)) is not None:
        return why
    if weight.values.device != x.device:
        return f"its tensors are on {x.device}, {weight.values.device}"
    if isinstance(weight, EightBitWeight) and group < inner and (inner % group or group % LEAST_UNIT):
        return f"blocks of {group} inner positions must divide {inner} and be a multiple of {LEAST_UNIT}"
    if isinstance(weight, Int4Weight) and span_of(group, inner) < KERNEL_SPAN:
        return f"numbers are multiplied in blocks of {4 * KERNEL_SPAN}, which {inner} inner positions do not fill"
    if weight.values.stride(1) != 1 or not weight.scales.is_contiguous():
        return f"an output's numbers and all scales must be contiguous, got strides {weight.values.stride()}"
    return None


def _quantised_linear(x: Tensor, values: Tensor, scales: Tensor, layout: str, group: int, tall: int,
                      bias: Tensor | None, added: Tensor | None) -> Tensor:  # fmt: skip
    from specdec.model.fusion.quantised.linear_kernel import launch_quantised_linear

    return launch_quantised_linear(x, values, scales, layout, group, tall, bias, added)[0]


torch.library.define(
    "specdec::quantised_linear",
    "(Tensor x, Tensor values, Tensor scales, str layout, int group, int tall, Tensor? bias, Tensor? added) -> Tensor",
)
torch.library.impl("specdec::quantised_linear", "CompositeExplicitAutograd", _quantised_linear)
torch.library.register_fake(
    "specdec::quantised_linear", lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0])
)


def _dequantise(values: Tensor, scales: Tensor, layout: str, group: int, tall: int, dtype: torch.dtype) -> Tensor:
    from specdec.model.fusion.quantised.matrix_kernel import launch_matrix

    return launch_matrix(values, scales, layout, group, tall, dtype)


torch.library.define(
    "specdec::dequantise", "(Tensor values, Tensor scales, str layout, int group, int tall, ScalarType dtype) -> Tensor"
)
torch.library.impl("specdec::dequantise", "CompositeExplicitAutograd", _dequantise)
torch.library.register_fake(
    "specdec::dequantise",
    lambda values, scales, layout, group, tall, dtype: values.new_empty(
        len(values), values.shape[1] * (4 if layout.startswith("int4") else 1), dtype=dtype
    ),
)
