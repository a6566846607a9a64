"""What a reader of quantised layers says about one layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from specdec.model.fusion.quantised.packed import PackedWeight


@dataclass(frozen=True, slots=True)
class Reading:
    """A quantised layer: `pack` makes a packed weight of its numbers, or is None, and `why` says why not.

    kind: the format, for people.
    pack: may still find that the numbers are not what the layer says, and give None."""

    kind: str
    pack: Callable[[], PackedWeight | None] | None = None
    why: str | None = None


def refused(kind: str, why: str) -> Reading:
    """A layer that its own module runs."""
    return Reading(kind, None, f"{why}; its own module runs it")


def hooked(layer: nn.Module) -> bool:
    """Whether a layer has hooks, so that more than its product is wanted."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def attribute(owner: Any, name: str) -> Any:
    """An attribute of another package's object, None where it has none: packages are recognised, not imported."""
    return getattr(owner, name, None)
