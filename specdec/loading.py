"""Load a model from a folder or the hub, and say plainly what is wrong with a folder that is not a whole model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def check_model_folder(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError, naming the file, unless `folder` has a config and whole safetensors."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model directory {folder} {'is a file' if folder.exists() else 'does not exist'}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model directory {folder} has no config.json")
    shards = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{index} is damaged: {type(error).__name__}: {error}") from error
    for shard in shards:
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"model directory {folder} lacks its weights {shard}")
        try:
            with safe_open(folder / shard, "pt") as weights:
                weights.keys()
        except SafetensorError as error:
            size = (folder / shard).stat().st_size
            raise ValueError(f"{folder / shard} is damaged or half-written ({size} bytes): {error}") from error


def local_folder(name: str | Path) -> Path | None:
    """`name` as a path if it exists or looks like one (absolute, a leading dot, many slashes); None for a hub id."""
    path = Path(name).expanduser()
    looks = path.is_absolute() or str(name).startswith(".") or str(name).endswith("/") or str(name).count("/") > 1
    return path if path.exists() or looks else None


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"):
    """A transformers causal language model in eval mode, from a folder or a hub id.

    A path that exists, or looks like one, is checked as a folder first. Raises FileNotFoundError or ValueError for a
    missing, damaged or incomplete one, ValueError for an unknown dtype; errors of the hub pass through."""
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f'dtype must be "auto", a torch.dtype or the name of one, got {dtype!r}')
    path = local_folder(name)
    if path is not None:
        check_model_folder(path)
        name = path
    from transformers import AutoModelForCausalLM  # takes seconds

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"the weights of {name} do not fit its config: {error}") from error
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights that its config calls for, among them {missing[0]}")
    return model.eval().to(device)
