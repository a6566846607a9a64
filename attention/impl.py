"""Which implementation runs: the best available one, or exactly the one that was asked for."""

import importlib.util
import os
from collections.abc import Sequence

import torch

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_available(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of `device`: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    return TRITON_INSTALLED and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def resolve(impl: str | None, device: torch.device, implementations: Sequence[str] = ("triton", "reference")) -> str:
    """The name to run for `impl`: None takes "triton" for tensors on a GPU and "reference" elsewhere (the interpreter only on request).

    Raises ValueError for a name that is not one of `implementations` or cannot run on `device`. Nothing falls back silently.
    """
    if impl is None:
        return "triton" if device.type == "cuda" and triton_available(device) else "reference"
    if impl not in implementations:
        raise ValueError(f"impl={impl!r} is not one of {list(implementations)}")
    if impl == "triton" and not triton_available(device):
        raise ValueError(
            f"impl='triton' cannot run here: it needs the package triton and tensors on a GPU (or TRITON_INTERPRET=1), got device {device} "
            f"and triton {'installed' if TRITON_INSTALLED else 'missing'}"
        )
    return impl
