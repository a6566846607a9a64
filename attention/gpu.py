"""What launching a kernel needs to know about a GPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one: Triton launches there, wherever its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of `x` on a device, through pinned memory: the host waits for nothing that was launched before."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 4 elsewhere, so that work is divided in the interpreter too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory for a program's tiles: all but 2 KiB for reductions and tables; a Hopper's on a CPU."""
    if device.type != "cuda":
        return 232448 - 2048
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin - 2048  # type: ignore[attr-defined]  # torch's stub lacks it
