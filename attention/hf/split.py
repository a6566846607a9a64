"""Weights that are split over processes (tensor parallelism), which torch holds as DTensors."""

import sys

from torch import Tensor, nn

SPLITTER = "transformers.distributed.tensor_parallel"  # its forwards take the place of those of layers that it splits


def is_split(weight: Tensor) -> bool:
    """Whether a weight is a DTensor, of which this process may hold a part only."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and isinstance(weight, module.DTensor)


def local_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight: `weight` itself unless it is split."""
    return weight.to_local() if is_split(weight) else weight  # type: ignore[attr-defined]


def split_by_outputs(layer: nn.Linear) -> bool:
    """Whether transformers has split a layer so that each process computes some of its outputs from the whole input."""
    weight = layer.weight
    if not is_split(weight) or getattr(vars(layer).get("forward"), "__module__", None) != SPLITTER:
        return False
    return len(weight.placements) == 1 and weight.placements[0].is_shard(0)  # type: ignore[attr-defined]
