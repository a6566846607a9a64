"""What products of few rows take, whatever their weights are stored in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ROWS = 64  # for more rows cuBLAS is as fast on an H200


class Norm(NamedTuple):
    """An RMS norm x / sqrt(mean(x²) + `eps`) * `weight`; with `offset` the weight is 1 + `weight`."""

    weight: Tensor
    eps: float
    offset: bool


def misfit(x: Tensor, shape: Sequence[int], bias: Tensor | None, added: Tensor | None) -> str | None:
    """Why a kernel cannot multiply `x [..., in]` by a matrix of `shape` (out, in); None if it can."""
    given = [t for t in (x, bias, added) if t is not None]
    if x.dtype not in (torch.bfloat16, torch.float16) or any(t.dtype != x.dtype for t in given):
        return f"it takes rows and weights of one 16-bit type, got {', '.join(str(t.dtype) for t in given)}"
    if x.shape[-1:] != shape[1:] or bias is not None and (bias.shape != shape[:1] or bias.stride(0) != 1):
        return (
            f"shapes must fit, and a bias be contiguous, got {list(x.shape)}, {list(shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    if added is not None and added.shape != (*x.shape[:-1], shape[0]):
        return f"what is added must have the product's shape {[*x.shape[:-1], shape[0]]}, got {list(added.shape)}"
    if any(t.device != x.device for t in given):
        return f"its tensors are on {', '.join(str(t.device) for t in given)}"
    if not 0 < x.numel() <= MAX_ROWS * shape[1]:
        return f"it takes 1 to {MAX_ROWS} rows, got {list(x.shape)}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "it has no backward, and a gradient is wanted"
    return None
