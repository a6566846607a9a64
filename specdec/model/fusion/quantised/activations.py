"""Activations in 8 bits: which models have them, and which are refused since tokens would depend on those beside them.

A scale for each token makes an 8-bit activation a function of the token alone; but a sum that is rounded otherwise, by
1e-7, may become another 8-bit number, which moves logits as much as 16-bit arithmetic does."""

import torch
from torch import nn

from specdec.model.fusion.quantised.reading import attribute


def require_token_scales(model: nn.Module) -> None:
    """Raise ValueError for a layer that scales all tokens of a forward by their common largest number.

    Scales for each token, and constant ones from a calibration, are functions of the token alone."""
    for name, module in model.named_modules():
        if (kind := _scale_of_all_tokens(module)) is not None:
            raise ValueError(
                f"{name} of {type(model).__name__} ({kind}) scales its 8-bit activations per tensor: a token's result "
                "would depend on the tokens beside it in a batch; quantise with scales per token (torchao: "
                "granularity=PerRow()) or constant ones"
            )


def quantises_activations(model: nn.Module) -> bool:
    """Whether a layer turns its inputs into 8-bit numbers, so that greedy texts may part at near-ties."""
    return any(_given(module) is not None for module in model.modules())


def _given(module: nn.Module):
    """How a layer quantises its inputs, in its package's words; None where it does not."""
    data = _weight(module)
    if (dtype := attribute(data, "activation_dtype")) == torch.float8_e4m3fn:
        return dtype
    how = attribute(data, "act_quant_kwargs")
    return _scheme(module) if how is None else how


def _scale_of_all_tokens(module: nn.Module) -> str | None:
    """The format of a layer with dynamic activation scales per tensor; None for all others."""
    data, scheme = _weight(module), _scheme(module)
    how = attribute(data, "act_quant_kwargs")
    if how is not None and attribute(data, "act_quant_scale") is None:
        if type(attribute(how, "granularity")).__name__ == "PerTensor":
            return type(data).__name__
    strategy = attribute(scheme, "strategy")
    if getattr(strategy, "value", strategy) == "tensor" and attribute(scheme, "dynamic"):
        return "compressed-tensors"
    return None


def _weight(module: nn.Module):
    """A layer's weight, of torchao's types too; None where it has none."""
    weight = module._parameters.get("weight")
    return None if weight is None else weight.data


def _scheme(module: nn.Module):
    """What compressed-tensors does to a layer's inputs; None: nothing."""
    return attribute(attribute(module, "quantization_scheme"), "input_activations")
