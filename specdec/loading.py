"""Load a model from a folder or the hub, and say plainly what is wrong with a folder that is not a whole model."""

import importlib.util
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from attention.hf.causal import require_causal_lm_config, require_text_adapter

MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def check_model_folder(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError, naming the file, unless `folder` has a config and whole weights."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model directory {folder} {'is a file' if folder.exists() else 'does not exist'}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model directory {folder} has no config.json")
    read_json(folder / "config.json")
    _check_weights(folder, MODEL_WEIGHTS)


def _check_weights(folder: Path, names: tuple[str, ...]) -> None:
    """Raise an error unless all files of weights under the first of `names` that there is are whole."""
    found = next((name for name in names if any(path.is_file() for path in _places(folder, name))), None)
    if found is None:
        raise FileNotFoundError(f"model directory {folder} lacks its weights {' or '.join(names)}")
    index, whole = _places(folder, found)
    shards = _shards(index) if index.is_file() else [whole.name]
    for shard in shards:
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"model directory {folder} lacks its weights {shard}")
        check_weights_file(folder / shard)


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.index.json", folder / name


def _shards(index: Path) -> list[str]:
    content = read_json(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} is damaged: it needs metadata, and a weight_map of names to files")
    return sorted(set(shards.values()))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: {path.name} must hold an object, got {type(content).__name__}")
    return content


def open_weights(path: Path):
    """A safetensors file, opened. Raises ValueError, naming the file, for a damaged one."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or half-written ({path.stat().st_size} bytes): {error}") from error


def check_weights_file(path: Path) -> None:
    """Raise ValueError, naming the file, for damaged safetensors or a .bin that is not whole or not tensors alone."""
    if path.suffix == ".safetensors":
        with open_weights(path) as weights:
            weights.keys()
        return
    size = path.stat().st_size
    try:
        held = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or half-written ({size} bytes): {_in_short(error)}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} ({size} bytes) holds no tensors, or more than tensors, which is not read") from error
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise ValueError(f"{path} ({size} bytes) must map names to tensors, as torch.save writes model.state_dict()")


def _in_short(error: Exception) -> str:
    """The beginning of an error's message, in one line."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def local_folder(name: str | Path) -> Path | None:
    """`name` as a path if it exists or looks like one (absolute, a leading dot, many slashes); None for a hub id."""
    path = Path(name).expanduser()
    looks = path.is_absolute() or str(name).startswith(".") or str(name).endswith("/") or str(name).count("/") > 1
    return path if path.exists() or looks else None


def weight_places(folder: Path) -> dict[str, Path]:
    """The file of each weight in a folder of model.safetensors or pytorch_model.bin, whole or in shards.

    Raises FileNotFoundError or ValueError, naming the file, for missing or damaged ones."""
    _check_weights(folder, MODEL_WEIGHTS)
    found = next(name for name in MODEL_WEIGHTS if any(path.is_file() for path in _places(folder, name)))
    index, whole = _places(folder, found)
    if index.is_file():
        return {name: folder / shard for name, shard in read_json(index)["weight_map"].items()}
    if whole.suffix == ".safetensors":
        with open_weights(whole) as weights:
            return dict.fromkeys(weights.keys(), whole)
    return dict.fromkeys(_load_bin(whole, "meta"), whole)


def read_weights(places: Mapping[str, Path], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights `names`, which `weight_places` has found; no other is kept. Raises ValueError for absent ones."""
    wanted = list(names)
    found: dict[str, torch.Tensor] = {}
    for file in sorted({places[name] for name in wanted}):
        here = [name for name in wanted if places[name] == file]
        if file.suffix == ".safetensors":
            with open_weights(file) as weights:
                inside = set(weights.keys())
                found |= {name: weights.get_tensor(name) for name in here if name in inside}
        else:
            held = _load_bin(file, "cpu")
            found |= {name: held[name].clone() for name in here if name in held}
        if absent := [name for name in here if name not in found]:
            raise ValueError(f"{file} lacks the weight {absent[0]}, which its index says it has")
    return found


def _load_bin(path: Path, device: str) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))


def fetch_weights(name: str | Path) -> Path:
    """The folder of a config and weights, fetched from the hub unless `name` is a path (see `local_folder`)."""
    path = local_folder(name)
    if path is not None:
        if not path.is_dir():
            raise FileNotFoundError(f"directory {path} {'is a file' if path.exists() else 'does not exist'}")
        return path
    from huggingface_hub import snapshot_download

    path = Path(
        snapshot_download(str(name), allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"])
    )
    if any(path.glob("*.safetensors")):
        return path
    return Path(snapshot_download(str(name), allow_patterns=["config.json", "*.bin", "*.bin.index.json"]))


def load_model(name: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"):
    """A transformers causal language model in eval mode, from a folder or a hub id.

    Weights are safetensors, or a pytorch_model.bin of nothing but tensors, whole or in shards. A PEFT adapter (extra
    `train`) is merged into the base model that it names. A path that exists, or looks like one, is checked as a folder
    first. Raises FileNotFoundError or ValueError for a missing, damaged or incomplete one, ValueError for an unknown
    dtype, `attention.UnsupportedArchitecture` for classifiers, encoders and adapters with virtual tokens, ImportError
    for an adapter without PEFT; errors of the hub pass through."""
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f'dtype must be "auto", a torch.dtype or the name of one, got {dtype!r}')
    from transformers.utils import find_adapter_config_file

    path = local_folder(name)
    adapter = find_adapter_config_file(str(name)) if path is None else path / ADAPTER
    if adapter is not None and Path(adapter).is_file():
        settings = read_json(Path(adapter))
        require_text_adapter(name, settings)
        if importlib.util.find_spec("peft") is None:
            raise ImportError(f"{name} is a PEFT adapter, which needs peft: pip install 'specdec-lab[train]'")
        if path is not None:
            _check_weights(path, ADAPTER_WEIGHTS)
        if path is None or not (path / "config.json").is_file():  # otherwise transformers loads model and adapter
            return _merged(path or name, settings.get("base_model_name_or_path"), dtype).eval().to(device)
    if path is not None:
        check_model_folder(path)
    return _load(path or name, dtype).eval().to(device)


def _load(name: str | Path, dtype: torch.dtype | str):
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds

    require_causal_lm_config(name, AutoConfig.from_pretrained(name))
    try:
        options: dict[str, Any] = dict(dtype=dtype, weights_only=True, output_loading_info=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    except RuntimeError as error:
        raise ValueError(f"the weights of {name} do not fit its config: {error}") from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):  # which lists all that there are
            raise
        raise ValueError(f"{name} holds no causal language model: {str(error).splitlines()[0]}") from error
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights that its config calls for, among them {missing[0]}")
    return model


def _merged(adapter: str | Path, base: str | None, dtype: torch.dtype | str):
    """The model `base` with the weights of `adapter` merged into its own, in its dtype."""
    from peft import PeftModel

    if not base:
        raise ValueError(f"{adapter} names no base model: base_model_name_or_path in {ADAPTER} is {base!r}")
    try:
        model = load_model(base, dtype)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"the base model of the adapter {adapter}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, AttributeError, UserWarning) as error:
        raise ValueError(f"the adapter {adapter} does not fit its base model {base}: {_in_short(error)}") from error
