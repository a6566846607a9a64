"""Ways to quantise a target's weights or its keys and values: what each is, and the model that it gives."""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import specdec
from scripts import calibrate_quantised
from scripts.common.quantise import GROUP, linear_layers, output_name, quantise
from scripts.generate_bench.speeds import NotAvailable

SMALL_GROUP = 32


@dataclass(frozen=True, slots=True)
class Quantisation:
    """A line of the table: `weights` of `scripts.common.quantise`, in groups of `group` in 4 bits; or `calibrated` by a
    method of `scripts.calibrate_quantised`; or keys and values in `kv_dtype`. All else is computed in `dtype`."""

    name: str
    title: str
    weights: str | None = None
    group: int = GROUP
    calibrated: str | None = None
    kv_dtype: str | None = None
    dtype: torch.dtype = torch.float32


UNQUANTISED = Quantisation("float32", "weights as they are, in float32")
QUANTISATIONS = (
    UNQUANTISED,
    Quantisation("bfloat16", "everything in bfloat16", dtype=torch.bfloat16),
    Quantisation("int8", "weights int8", "int8"),
    Quantisation("int8-dynamic", "weights and activations int8", "int8-dynamic"),
    Quantisation("fp8", "weights fp8", "fp8"),
    Quantisation("int4", f"weights int4, groups of {GROUP}", "int4"),
    Quantisation("int4-small", f"weights int4, groups of {SMALL_GROUP}", "int4", SMALL_GROUP),
    Quantisation("gptq", "weights int4 by GPTQ", calibrated="gptq"),
    Quantisation("awq", "weights int4 by AWQ", calibrated="awq"),
    Quantisation("smoothquant", "SmoothQuant, W8A8", calibrated="smoothquant"),
    Quantisation("kv-int8", "keys and values int8", kv_dtype="int8"),
    Quantisation("kv-fp8", "keys and values fp8", kv_dtype="fp8"),
)


@dataclass(frozen=True, slots=True)
class Layers:
    """How many linear layers are quantised, in groups of how many inner positions, and which stay as they are."""

    quantised: int
    kept: list[str]
    group: int | None = None


def quantised_target(checkpoint: Path, what: Quantisation, made: Path, group: int):
    """The model of `checkpoint` as `what` says -> (model, Layers).

    made: the folder of what is calibrated, `made`/METHOD: made now where llm-compressor is installed, with `group`.

    Raises NotAvailable, with the way to it, for a package or a calibrated checkpoint that is missing."""
    model = specdec.load_model(checkpoint, what.dtype, "cpu")
    names, output = list(linear_layers(model)), output_name(model)
    if what.calibrated is not None:
        folder = calibrated(checkpoint, what.calibrated, made / what.calibrated, group)
        model = specdec.load_model(folder, what.dtype, "cpu")
        kept = [name for name in names if name in _ignored(folder)]
        used = None if what.calibrated == "smoothquant" else group
        return model, Layers(len(names) - len(kept), [*kept, output], used)
    if what.weights is None:
        return model, Layers(0, [])
    try:
        kept = quantise(model, what.weights, what.group)
    except ImportError as error:
        raise NotAvailable(str(error)) from error
    return model, Layers(len(names) - len(kept), [*kept, output], what.group if what.weights == "int4" else None)


def calibrated(checkpoint: Path, method: str, folder: Path, group: int) -> Path:
    """`folder` with the checkpoint that `scripts.calibrate_quantised` makes. Raises NotAvailable."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise NotAvailable("compressed-tensors is not installed: pip install 'specdec-lab[quant]'")
    if (folder / "config.json").is_file():
        return folder
    where = [os.path.relpath(path) for path in (checkpoint, folder)]
    arguments = ["--model", where[0], "--method", method, "--group", str(group), "--output", where[1]]
    if importlib.util.find_spec("llmcompressor") is None:
        command = " ".join(["python -m scripts.calibrate_quantised", *arguments])
        raise NotAvailable(f"llm-compressor is not installed; in an environment of its own: {command}")
    calibrate_quantised.main(arguments)
    return folder


def _ignored(folder: Path) -> list[str]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
