"""Triton kernel of `specdec.drafters.network.rotation`: cosines and sines of positions in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping


@triton.jit
def _angles_kernel(positions, frequencies, cos, sin, factor, width, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    await_input(OVERLAP, True)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token, column = at // width, at % width
    angle = tl.load(positions + token, mask=inside, other=0).to(tl.float32)
    angle *= tl.load(frequencies + column, mask=inside, other=0.0)
    tl.store(cos + at, (tl.cos(angle) * factor).to(cos.dtype.element_ty), mask=inside)
    tl.store(sin + at, (tl.sin(angle) * factor).to(sin.dtype.element_ty), mask=inside)


def launch_angles(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `rotation.angles`."""
    shape, block = (len(positions), len(frequencies)), 512
    cos, sin = (torch.empty(shape, dtype=dtype, device=positions.device) for _ in range(2))
    if cos.numel():
        _angles_kernel[(triton.cdiv(cos.numel(), block),)](
            positions.contiguous(), frequencies, cos, sin, factor, shape[1], cos.numel(), block, num_warps=4,
            **overlapping(positions.device),
        )  # fmt: skip
    return cos, sin
