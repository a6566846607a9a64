"""Kernels that start while the one before them ends (programmatic dependent launch, on Hopper and later).

The launch of a small kernel costs about as much as its work. One that calls `await_input` before it touches what other
kernels write may be launched with `overlapping(device)`: its launch is then hidden behind the end of the kernel before
it. Weights, which no such kernel writes, may be read earlier; with EARLY ones several kernels may be waiting in a row.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def await_input(OVERLAP: tl.constexpr, EARLY: tl.constexpr = False):
    """Wait until everything launched before has been written, and let what comes next start: EARLY, before this wait.

    The small kernels of a layer gain some tenths of a microsecond each by that on an H200; the one before its largest
    product loses more."""
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
