"""What the kernels ask about a GPU."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one: Triton launches there, wherever its tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere 4, so that the interpreter sees work divided too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shared_memory(device: torch.device) -> int:
    """Bytes a processor has for tiles: a Hopper's, where there is no GPU, less what reductions and tables take."""
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448
    ) - 2048
