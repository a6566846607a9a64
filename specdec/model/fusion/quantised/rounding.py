"""Weights in 16 or 32 bits, rounded to the nearest of few numbers: no calibration, a pass over the matrix.

Source: the baseline "RTN" of Frantar et al. 2023 (GPTQ) and Lin et al. 2024 (AWQ)."""

import torch
from torch import Tensor

from specdec.model.fusion.quantised.packed import (
    SIXTEEN_BITS,
    SPAN,
    EightBitWeight,
    PackedWeight,
    group_misfit,
    is_group,
    pack_int4,
)

AT_ONCE = 1 << 24  # numbers of a matrix that are widened to float32 at a time
SMALLEST_SCALE = 2.0**-126  # a group of zeros stays finite


def rounding_misfit(inner: int, bits: int, group: int) -> str | None:
    """Why `inner` positions cannot be rounded to `bits` with a scale for each `group`; None if they can.

    Raises ValueError for other bits than 4 and 8, and a group that fits no width."""
    if bits not in (4, 8):
        raise ValueError(f"weights are rounded to 4 or 8 bits, got bits={bits!r}")
    if not isinstance(group, int) or group < 1 or bits == 4 and not is_group(group):
        raise ValueError(f"group must be 16, 32 or a multiple of {2 * SPAN} inner positions, got {group!r}")
    if bits == 4:
        return group_misfit(inner, group)
    return f"its {inner} inner positions do not divide into groups of {group}" if inner % group else None


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int, group: int) -> PackedWeight:
    """`weight [out, in]` in 4 bits with a scale and a zero, or in 8 bits with a scale, for each output and `group`.

    4 bits (asymmetric): scale = (high - low) / 15 of a group's numbers and 0, q = round(w / scale) + zero, zero =
    round(-low / scale); 8 bits (symmetric): scale = max |w| / 127, q = round(w / scale). Each weight is off by at most
    half a scale, next to the ends of a group a little more, as the scale of 4 bits is rounded to 16 bits.

    Raises ValueError for what `rounding_misfit` says, and weights that are not finite.

    >>> weight = torch.linspace(-1, 2, 32)[None]
    >>> round_to_nearest(weight, 4, 32)
    Traceback (most recent call last):
        ...
    ValueError: numbers are read in blocks of 64, which 32 inner positions do not fill
    >>> bool((round_to_nearest(weight, 8, 32).dequantise(torch.float32) - weight).abs().max() <= 2 / 127 / 2)
    True
    """
    if why := rounding_misfit(weight.shape[1], bits, group):
        raise ValueError(why)
    rows = max(1, AT_ONCE // weight.shape[1])
    first, *others = [_round(part, bits, group) for part in weight.split(rows)]
    return first.join(others) if others else first  # type: ignore[arg-type]


def _round(weight: Tensor, bits: int, group: int) -> PackedWeight:
    blocks = weight.float().unflatten(1, (-1, group))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if not (low.isfinite() & high.isfinite()).all():
        raise ValueError("weights that are not finite cannot be rounded to few bits")
    if bits == 8:
        scales = (torch.maximum(-low, high) / 127).clamp(min=SMALLEST_SCALE)
        numbers = (blocks / scales[..., None]).round().clamp(-127, 127)
        return EightBitWeight(numbers.flatten(1).to(torch.int8), scales, 1, group)
    dtype = weight.dtype if weight.dtype in SIXTEEN_BITS else torch.bfloat16
    scales = ((high - low) / 15).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    steps = scales.float()
    zeros = (-low / steps).round().clamp(0, 15)
    numbers = ((blocks / steps[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return pack_int4(numbers.flatten(1), scales, zeros.to(torch.int32), group)
