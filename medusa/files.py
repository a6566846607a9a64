"""Files of Medusa heads, in a folder or on the hub: which there are, and reading the wanted weights alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.loading import local_folder, open_weights, read_json

WEIGHTS, LEGACY = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # of a model with its heads, and of vLLM's heads
FILES = (WEIGHTS, LEGACY, WHOLE, INDEX)


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A folder's config, and its weights by name: the file that has one, or for a legacy file the tensor.

    `whole`: they are in files that a whole model would have."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Path] | dict[str, Tensor]
    whole: bool

    def read(self, names: dict[str, str]) -> dict[str, Tensor]:
        """The weights that `names` has, by the names that it gives them; no other is read."""
        places = {name: self.weights[name] for name in names}
        found = {name: place for name, place in places.items() if isinstance(place, Tensor)}
        for file in sorted({place for place in places.values() if isinstance(place, Path)}):
            with _opened(file) as weights:
                inside = set(weights.keys())
                for name in (name for name, place in places.items() if place == file):
                    if name not in inside:
                        raise ValueError(f"{file} lacks the weight {name}, which {INDEX} says it has")
                    found[name] = weights.get_tensor(name)
        return {names[name]: weight for name, weight in found.items()}


def find_files(name: str | Path) -> HeadFiles:
    """The files in a folder or on the hub; files of heads alone before those of a whole model.

    Raises FileNotFoundError for a folder without config or weights, ValueError for a damaged file."""
    folder = _fetch(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"heads directory {folder} has no config.json")
    config = read_json(folder / "config.json")
    for file in (file for file in FILES if (folder / file).is_file()):
        if file == LEGACY:
            tensors = torch.load(folder / LEGACY, map_location="cpu", weights_only=True)
            return HeadFiles(folder, config, tensors, whole=False)
        if file == INDEX:
            shards = {weight: folder / shard for weight, shard in _shards(folder).items()}
            return HeadFiles(folder, config, shards, whole=True)
        with _opened(folder / file) as weights:
            return HeadFiles(folder, config, dict.fromkeys(weights.keys(), folder / file), whole=file == WHOLE)
    raise FileNotFoundError(f"heads directory {folder} has none of {', '.join(FILES)}")


def _shards(folder: Path) -> dict[str, str]:
    """The shard of each weight."""
    index = read_json(folder / INDEX)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map")
    return index["weight_map"]


def _opened(file: Path):
    if not file.is_file():
        raise FileNotFoundError(f"heads directory {file.parent} lacks its weights {file.name}")
    return open_weights(file)


def _fetch(name: str | Path) -> Path:
    """The folder of the heads; of a whole model on the hub only the shards that hold heads are fetched."""
    path = local_folder(name)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    files = ["config.json", WEIGHTS, LEGACY, INDEX]
    path = Path(snapshot_download(str(name), allow_patterns=files))
    if (path / WEIGHTS).is_file() or (path / LEGACY).is_file():
        return path
    shards = [WHOLE]
    if (path / INDEX).is_file():
        shards = sorted({shard for weight, shard in _shards(path).items() if weight.startswith("medusa")})
    return Path(snapshot_download(str(name), allow_patterns=[*files, *shards]))
