"""Whether a module computes what a kernel computes: both run on the same random inputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def random_input(like: Tensor, *shape: int) -> Tensor:
    """Normal numbers `[1, *shape]` with the dtype and device of `like`, from a generator of their own.

    Raises ValueError for weights on the meta device."""
    if like.is_meta:  # a kernel would be launched all the same
        raise ValueError("weights on the meta device cannot be tried")
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(like)


def agree(ours: Tensor, module: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether `module(*inputs)` equals `ours` up to a few roundings."""
    theirs = module(*inputs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    eps, error, theirs = torch.finfo(ours.dtype).eps, ours.float() - theirs.float(), theirs.float()
    close = float(error.abs().max()) <= 8 * eps * float(theirs.abs().max())  # False for NaN
    return close and float(error.norm()) <= max(0.5 * eps, 1e-6) * float(theirs.norm())


def settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Numbers and strings among a module's attributes: what may distinguish it from others of its type."""
    return tuple(
        sorted(
            (name, repr(value))
            for name, value in vars(module).items()
            if isinstance(value, int | float | str | None) and name != "layer_idx"
        )
    )


def cannot_be_tried(weight: Tensor) -> bool:
    """Whether weights are on the meta device, packed, or not finite, so that failing with them proves nothing."""
    return weight.is_meta or not weight.is_floating_point() or not bool(weight.isfinite().all())
