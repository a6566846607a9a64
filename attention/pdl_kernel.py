"""Programmatic dependent launch: kernels that start while the one before them ends, on Hopper and later.

The launch of a small kernel costs about as much as its work. A kernel that calls `await_input` before it touches what
other kernels write may be launched with `overlapping(device)`: its launch then overlaps the end of the kernel before
it. Weights, which no such kernel writes, may be read earlier. With EARLY several kernels may wait one after the other.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def await_input(OVERLAP: tl.constexpr, EARLY: tl.constexpr = False):
    """Wait until the kernels before have written their results, and let the next one start; EARLY: before the wait.

    EARLY gains the small kernels of a layer some tenths of a microsecond each on an H200; the one before the layer's
    largest product loses more."""
    if OVERLAP:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        else:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()


@cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(device: torch.device) -> dict:
    """Keywords for the launch of a kernel with a constant OVERLAP."""
    return {"OVERLAP": True, "launch_pdl": True} if _can_overlap(device) else {"OVERLAP": False}
