"""Chooses which implementation runs: the best available one, or exactly the one that was named."""

import importlib.util
import os
from collections.abc import Callable

import torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_available(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of `device`: a GPU's, or a CPU's under TRITON_INTERPRET=1."""
    return TRITON_INSTALLED and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def resolve(impl: str | None, device: torch.device, fallback_reason: Callable[[], str | None] = lambda: None) -> str:
    """The name of the implementation to run: "triton" or "reference".

    `impl=None` takes "triton" for tensors on a GPU and "reference" elsewhere (Triton's interpreter is slow and runs
    only when named). `fallback_reason()` tells why the kernel cannot do the call, or gives None. Raises ValueError for
    an unknown name and for "triton" where it cannot run: a named implementation never falls back."""
    if impl is None:
        usable = device.type == "cuda" and triton_available(device) and fallback_reason() is None
        return "triton" if usable else "reference"
    if impl not in ("triton", "reference"):
        raise ValueError(f"impl={impl!r} is not one of ['triton', 'reference']")
    if impl == "triton" and not triton_available(device):
        raise ValueError(
            "impl='triton' cannot run here: it needs the package triton and tensors on a GPU (or TRITON_INTERPRET=1), "
            f"got device {device} and triton {'installed' if TRITON_INSTALLED else 'missing'}"
        )
    if impl == "triton" and (reason := fallback_reason()) is not None:
        raise ValueError(f"impl='triton' cannot do this call: {reason}")
    return impl
