"""Where a model computes, which its weights do not tell while accelerate keeps them elsewhere."""

from typing import Any

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of a transformers model's inputs: its weights', or where accelerate runs offloaded ones.

    Raises ValueError for a model on the meta device that nothing brings to another.

    >>> layer = nn.Linear(2, 2, device="meta")
    >>> layer.device = layer.weight.device  # transformers' models have such a property
    >>> device_of(layer)
    Traceback (most recent call last):
    ...
    ValueError: Linear has no weights: they are on the meta device
    """
    device: torch.device = model.device  # type: ignore[assignment]  # nn.Module has no such attribute
    if device.type != "meta":
        return device
    places = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks_of(module))
    where = next((place for place in places if place is not None), None)
    if where is None:
        raise ValueError(f"{type(model).__name__} has no weights: they are on the meta device")
    return torch.device(where)


def offloads(module: nn.Module) -> bool:
    """Whether accelerate brings this module's weights for a forward and takes them away after it."""
    return any(getattr(hook, "offload", False) for hook in _hooks_of(module))


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate around a module's forward."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else getattr(hook, "hooks", [hook])
