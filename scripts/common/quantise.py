"""Weights of a model in 8 or 4 bits through torchao, rounded to the nearest, as transformers' `TorchAoConfig` does."""

import importlib.util
from typing import Any

import torch
from torch import nn

KINDS = ("int8", "int8-dynamic", "fp8", "int4")
GROUP = 128


def output_name(model) -> str:
    """The name of the output layer, which stays in 16 bits."""
    output = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is output)


def linear_layers(model) -> dict[str, nn.Linear]:
    """All linear layers but the output layer, by name."""
    output = output_name(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != output}


def misfits(model, group: int = GROUP) -> list[str]:
    """The layers whose inner positions do not divide into groups of `group`, which therefore stay in 16 bits.

    >>> model = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    >>> model.get_output_embeddings = lambda: model[2]
    >>> misfits(model)
    ['1']
    """
    return [name for name, layer in linear_layers(model).items() if layer.in_features % group]


def require_torchao() -> None:
    """Raise ImportError, which names the extra, without torchao."""
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("quantised weights need torchao: pip install 'specdec-lab[quant]'")


def quantise(model, kind: str, group: int = GROUP, output: bool = False) -> list[str]:
    """Quantise the linear layers of `model` in place; returns the names of those that stay as they are.

    output: the output layer too.

    kind: "int8" and "fp8" (weights, a scale for each output), "int8-dynamic" (activations too, a scale for each token),
        "int4" (weights, a scale for each output and `group` inner positions; its numbers lie in 8 bits on a CPU, and
        where torchao's own layout needs a package that is not there).

    Raises ValueError for another kind, ImportError without torchao."""
    if kind not in KINDS:
        raise ValueError(f"weights are quantised as one of {', '.join(KINDS)}, got {kind!r}")
    require_torchao()
    from torchao import quantization as ao

    made: dict[str, Any] = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "fp8": ao.Float8WeightOnlyConfig,
        "int4": lambda: (
            ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(group))
            if model.device.type == "cpu" or importlib.util.find_spec("mslk") is None
            else ao.Int4WeightOnlyConfig(group)
        ),
    }
    stay = misfits(model, group) if kind == "int4" else []
    wanted = linear_layers(model).keys() - set(stay) | ({output_name(model)} if output else set())
    ao.quantize_(model, made[kind](), filter_fn=lambda module, name: name in wanted)
    if kind == "fp8":
        for name in wanted:
            _mend_zeros(model.get_submodule(name).weight)
    return stay


def _mend_zeros(weight) -> None:
    """Make outputs zero whose weights all are: torchao divides them by a scale of zero, which gives NaN."""
    zeros = weight.scale == 0  # [out, 1]
    weight.scale.masked_fill_(zeros, 1)
    weight.qdata.view(torch.uint8).masked_fill_(zeros, 0)
