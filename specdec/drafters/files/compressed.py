"""Drafters in formats of compressed-tensors, whose weights that library unpacks into plain ones before they are read.

A drafter's outcome is checked by its target, so it may compute with the unpacked weights where an engine would round
activations too."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.files.fields import Fields

METHOD, PLACES = "compressed-tensors", ("quantization_config", "compression_config")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
SCALE = "weight_scale"  # every quantised layer has one
OF_INPUTS = ("input_scale", "input_zero_point")


def unpack(config: Mapping[str, Any],
           weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:  # fmt: skip
    """A drafter's config without what it says of compressed-tensors, its weights unpacked, and a line about that.

    Other files come back as they are, those of other methods too, which readers refuse. Unpacked are integers and
    8-bit floats in `FORMATS`. Raises ValueError, naming it, for another format or setting and for layers that lack a
    tensor, ImportError without the library."""
    place = next((name for name in PLACES if isinstance(config.get(name), dict)), None)
    if place is None or config[place].get("quant_method") != METHOD:
        return dict(config), dict(weights), ()
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ImportError(f"weights that {METHOD} has packed need that library: pip install 'specdec-lab[quant]'")
    groups, ignored = _groups(Fields(config[place], f"{place} of config.json"))
    plain, seen = dict(weights), set[str]()
    for name in sorted(name for name in weights if name.rpartition(".")[2] == SCALE):
        layer = name.rpartition(".")[0]
        seen.add(_unpack_layer(layer, plain, groups, ignored))
    rest = {name: value for name, value in config.items() if name != place}
    count = sum(name.rpartition(".")[2] == SCALE for name in weights)
    return (
        rest,
        plain,
        (f"{count} weights unpacked from {METHOD} ({', '.join(sorted(seen))}); activations stay as they are",),
    )


def _groups(fields: Fields) -> tuple[list[Any], list[str]]:
    """The schemes of a file's layers, each with its format, and the names of layers that have none."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme
    from torch import nn

    whole, ignored = fields.take("format", str, None), fields.take("ignore", list, [])
    for name in ("quant_method", "quantization_status", "global_compression_ratio", "version"):
        fields.take(name, object, None)
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        fields.refuse(name, f"which is not read of {METHOD}", {})
    given = fields.take("config_groups", dict)
    fields.refuse_others()
    groups = []
    for name, values in given.items():
        if not isinstance(values, dict):
            raise ValueError(f"{fields.where}: {name} of config_groups must be an object, got {values!r}")
        scheme = QuantizationScheme.model_validate(values)
        form = scheme.format or (whole if whole in FORMATS else None) or infer_module_format(nn.Linear, scheme)
        scheme.format = getattr(form, "value", form)
        if scheme.format not in FORMATS:
            raise ValueError(f"{fields.where}: {name} is {scheme.format}; of {METHOD} {', '.join(FORMATS)} are read")
        groups.append(scheme)
    return groups, ignored


def _unpack_layer(layer: str, weights: dict[str, Tensor], groups: list[Any], ignored: list[str]) -> str:
    """Put the plain weight of `layer` in place of what stands for it in `weights`; returns what that was, in words."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils.match import match_name

    named = lambda names: any(match_name(layer, name) for name in names)
    scheme = next((one for one in groups if "Linear" in one.targets or named(one.targets)), None)
    if scheme is None or named(ignored):
        raise ValueError(f"{layer}.{SCALE} is there, but no group of {METHOD} names the layer")
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    parts = compressor.compression_param_names(scheme)
    if missing := [part for part in parts if f"{layer}.{part}" not in weights]:
        raise ValueError(f"{layer} lacks {', '.join(missing)}, which {METHOD}'s {scheme.format} consists of")
    packed = {part: weights.pop(f"{layer}.{part}") for part in parts}
    weights[f"{layer}.weight"] = compressor.decompress(packed, scheme)["weight"]
    for part in OF_INPUTS if scheme.input_activations is not None else ():
        weights.pop(f"{layer}.{part}", None)
    return f"{scheme.format}, {scheme.weights.type}{scheme.weights.num_bits}"
