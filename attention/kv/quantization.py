"""Symmetric 8-bit quantisation of keys and values, one scale per token and kv head: the specification of the kernels.

    amax = max_d |x_d|                             scale = max(amax * (1 / top), 2^-126)
    q_d = round(x_d / scale)                       x_d ~ q_d * scale

top is 127 for int8 and 448 (the largest e4m3 number) for fp8, so the error is at most scale / 2 = amax / 254 (int8), or
1/16 of the number itself (fp8, apart from numbers below amax / 2^15). All in float32, to the nearest, ties to even. The
lower bound of the scale keeps rows of zeros, or of numbers next to zero, finite; a row with a NaN or an infinity comes
back as NaN or infinite, never as a number."""

import torch
from torch import Tensor

_TYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # name: stored as, largest magnitude
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32


def storage_dtype(kv_dtype: str | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the pages of a model that computes in `dtype`, which is `dtype` for `kv_dtype=None`.

    Raises ValueError for an unknown `kv_dtype`."""
    if kv_dtype is None:
        return dtype
    if kv_dtype not in _TYPES:
        raise ValueError(f"kv_dtype must be None or one of {list(_TYPES)}, got {kv_dtype!r}")
    return _TYPES[kv_dtype][0]


def largest(kv_dtype: str) -> float:
    """The largest magnitude of a stored number."""
    return _TYPES[kv_dtype][1]


def quantise(x: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """`x [..., D]` -> the stored numbers `[..., D]` and their float32 scales `[...]`.

    >>> q, scale = quantise(torch.tensor([[0.0, 0.5, -1.0]]), "int8")
    >>> q.tolist(), round(float(scale) * 127, 5)
    ([[0, 64, -127]], 1.0)
    """
    x, dtype, top = x.float(), storage_dtype(kv_dtype, x.dtype), largest(kv_dtype)
    # a product, since torch divides by a number differently on a GPU
    scale = (x.abs().amax(-1) * (1 / top)).clamp(min=SMALLEST_SCALE)
    q = (x / scale[..., None]).clamp(-top, top)
    return (q.round() if dtype == torch.int8 else q).to(dtype), scale


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """The float32 numbers that `q [..., D]` with `scale [...]` stands for."""
    return q.float() * scale[..., None]
