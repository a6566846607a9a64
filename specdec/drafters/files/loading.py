"""From a drafter's folder to its network, whatever its kind and format."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from specdec.drafters.files.compressed import unpack
from specdec.drafters.files.reading import Reading, TargetShape
from specdec.loading import fetch_weights, read_json, read_weights, weight_places

Config = TypeVar("Config")
Network = TypeVar("Network")
Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], TargetShape, Collection[str]], Reading[Config]]


def read_drafter(name: str | Path, shape: TargetShape, speculators: Reader[Config], flat: Reader[Config],
                 build: Callable[[Reading[Config]], Network], ignore: Collection[str] = ()
                 ) -> tuple[Network, Reading[Config]]:  # fmt: skip
    """What `build` makes of a drafter in a folder or on the hub, and what its file says.

    Weights that compressed-tensors has packed are unpacked first (`files.compressed`).

    speculators, flat: the readers of the two formats; ignore: fields of config.json that may be unknown.

    Raises FileNotFoundError for missing files, ImportError without a library to unpack with, and ValueError, naming the
    drafter, where a reader or `build` does."""
    folder = fetch_weights(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"drafter directory {folder} has no config.json")
    places = weight_places(folder)
    try:
        given, weights = read_json(folder / "config.json"), read_weights(places, places)
        given, weights, unpacked = unpack(given, weights)
        reader = speculators if "speculators_model_type" in given else flat
        reading = reader(given, weights, shape, ignore)
        reading = replace(reading, notes=(*reading.notes, *unpacked))
        return build(reading), reading
    except ValueError as error:
        raise ValueError(f"the drafter {name}: {error}") from error
