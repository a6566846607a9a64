"""Which implementation runs: the best available one, or exactly the one that was asked for."""

import importlib.util
import os
from collections.abc import Callable

import torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_available(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of `device`: on a GPU, or on a CPU in Triton's interpreter
    (TRITON_INTERPRET=1).
    """
    return TRITON_INSTALLED and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def resolve(impl: str | None, device: torch.device, fallback_reason: Callable[[], str | None] = lambda: None) -> str:
    """The name to run for `impl`: None takes "triton" for tensors on a GPU and "reference" elsewhere (the interpreter
    only on request).

    `fallback_reason()` says what keeps the kernel from a call, or None. Raises ValueError for another name than
    "triton" and "reference", or for "triton" where it cannot run. Nothing that was asked for by name falls back."""
    if impl is None:
        return (
            "triton"
            if device.type == "cuda" and triton_available(device) and fallback_reason() is None
            else "reference"
        )
    if impl not in ("triton", "reference"):
        raise ValueError(f"impl={impl!r} is not one of ['triton', 'reference']")
    if impl == "triton" and not triton_available(device):
        raise ValueError(
            "impl='triton' cannot run here: it needs the package triton and tensors on a GPU (or "
            f"TRITON_INTERPRET=1), got device {device} "
            f"and triton {'installed' if TRITON_INSTALLED else 'missing'}"
        )
    if impl == "triton" and (reason := fallback_reason()) is not None:
        raise ValueError(f"impl='triton' cannot do this call: {reason}")
    return impl
