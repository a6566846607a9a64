"""compressed-tensors layers after they unpacked themselves: packed again from their 16-bit numbers, exactly."""

import types

import pytest
import torch
from torch import nn

from specdec.model.fusion.quantised.activations import require_token_scales
from specdec.model.fusion.quantised.readers import PackedWeights, read
from tests.specdec.model.fusion.quantised.kinds import integers


def layer_of(kind: str, bits: int, numbers, scale, zero=None, **scheme) -> nn.Linear:
    """What transformers makes of a checkpoint: the 16-bit weight, its scale and a scheme."""
    layer = nn.Linear(numbers.shape[1], len(numbers), bias=False).bfloat16()
    wide = scale.repeat_interleave(-(-len(numbers) // len(scale)), 0)[: len(numbers)]
    wide = wide.repeat_interleave(numbers.shape[1] // scale.shape[1], 1)
    shift = 0 if zero is None else zero.repeat_interleave(numbers.shape[1] // zero.shape[1], 1)
    layer.weight.data = (numbers.float() - shift).bfloat16() * wide
    layer.weight_scale = nn.Parameter(scale)
    if zero is not None:
        layer.weight_zero_point = nn.Parameter(zero, requires_grad=False)
    args = types.SimpleNamespace(type=kind, num_bits=bits, symmetric=zero is None)
    given = dict(weights=args, input_activations=None, output_activations=None) | scheme
    layer.quantization_scheme = type("Scheme", (), {"__module__": "compressed_tensors.quantization"} | given)()
    layer.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x), layer)  # as the package does
    return layer


def scales(*shape: int) -> torch.Tensor:
    return (0.01 + torch.rand(shape, generator=torch.Generator().manual_seed(3))).bfloat16()


@pytest.mark.parametrize("case", ["int4", "int4 zeros", "int8", "int8 in all", "fp8", "fp8 blocks"])
def test_the_packed_numbers_are_found_again(case):
    kind = case.split()[0]
    if kind == "int4":
        zero = integers(-8, 8, 24, 2).cpu().to(torch.int8) if "zeros" in case else None
        numbers, scale = integers(-8, 8, 24, 256).cpu(), scales(24, 2)
    elif kind == "int8":
        zero, numbers, scale = None, integers(-128, 128, 24, 256).cpu(), scales(1 if "all" in case else 24, 1)
    else:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(1.0)
        zero, numbers, scale = None, every.repeat(24, 1), scales(*((1, 2) if "blocks" in case else (24, 1)))
    layer = layer_of("float" if kind == "fp8" else "int", 4 if kind == "int4" else 8, numbers, scale, zero)
    reading = read(layer)
    weight = PackedWeights().of([layer], [reading])
    assert reading.kind == kind and weight.dequantise(torch.bfloat16).equal(layer.weight)
    if kind == "int8":
        assert weight.values.equal(numbers.to(torch.int8))
    with torch.no_grad():
        layer.weight[0, 0] = 0.4 * layer.weight_scale[0, 0]  # no number of any format
    assert PackedWeights().of([layer], [read(layer)]) is None


def test_activations_in_eight_bits_are_left_to_their_module_and_refused_per_tensor():
    activations = types.SimpleNamespace(strategy="token", dynamic=True)
    layer = layer_of("int", 8, integers(-9, 9, 4, 8).cpu(), scales(4, 1), input_activations=activations)
    assert "quantises activations" in read(layer).why
    require_token_scales(layer)
    activations.strategy = "tensor"
    with pytest.raises(ValueError, match="compressed-tensors. scales its 8-bit activations per tensor"):
        require_token_scales(layer)
    activations.dynamic = False  # a constant
    require_token_scales(layer)
