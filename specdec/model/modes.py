"""The ways in which a `ModelRunner` runs forwards."""

import torch

from attention.native import library

MODES = ("eager", "graph", "compile")


def require_mode(mode: str, device: torch.device, ranks: int = 1) -> None:
    """Raise ValueError for an unknown mode, and for one that cannot run on `device` or over several `ranks`."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "eager" and ranks > 1:
        raise ValueError(f'a model whose weights are split over {ranks} ranks runs in mode="eager" only, got {mode!r}')
    if mode == "compile" and device.type == "cpu" and (why := library.why_unavailable()) is not None:
        raise ValueError(f'mode="compile" compiles kernels in C for a CPU, but {why}; mode="graph" needs none')


def best_mode(device: torch.device) -> str:
    """What "auto" means on `device`: "compile" on a CPU with a C compiler, else "graph"."""
    return "compile" if device.type == "cpu" and library.why_unavailable() is None else "graph"
