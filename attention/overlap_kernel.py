"""Kernels that start while the one before them ends (programmatic dependent launch, on Hopper and later).

The launch of a small kernel costs about as much as its work. One that calls `await_input` before it touches what other kernels write may be
launched with `overlapping(device)`: its launch is then hidden behind the end of the kernel before it. Weights, which the kernel directly before never
writes where models run, may be read earlier.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def await_input(OVERLAP: tl.constexpr):
    """Wait until everything launched before has been written, and let what comes next start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(device: torch.device) -> dict:
    """Keywords for the launch of a kernel with a constant OVERLAP."""
    return {"OVERLAP": True, "launch_pdl": True} if _can_overlap(device) else {"OVERLAP": False}
