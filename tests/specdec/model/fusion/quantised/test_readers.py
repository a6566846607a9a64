"""Layers of other packages: their numbers are read exactly, and what is another function is left to them, by name."""

import pytest
import torch
from torch import Tensor, nn

from specdec.model.fusion.quantised.activations import require_token_scales
from specdec.model.fusion.quantised.readers import PackedWeights, read
from tests.quantised_models import awq_words, gptq_words
from tests.specdec.model.fusion.quantised.kinds import integers, random


def quantised(config, outputs: int = 48, inner: int = 256, bias: bool = False) -> nn.Linear:
    """A layer in bfloat16 through torchao."""
    from torchao.quantization import quantize_

    layer = nn.Linear(inner, outputs, bias).bfloat16()
    quantize_(layer, config)
    return layer


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="torchao is not installed").quantization


def packed(layer: nn.Module):
    reading = read(layer)
    assert reading.why is None, reading.why
    return reading.pack()


def test_torchao_int8_and_fp8_weights_stay_where_they_are(torchao):
    for config, kind in ((torchao.Int8WeightOnlyConfig(), "int8"), (torchao.Float8WeightOnlyConfig(), "fp8")):
        layer = quantised(config)
        weight = packed(layer)
        assert weight.kind == kind and weight.values.data_ptr() == layer.weight.qdata.data_ptr()
        torch.testing.assert_close(weight.dequantise(torch.float32), layer.weight.dequantize(torch.float32))


def test_torchao_plain_int4_has_shifted_zeros(torchao):
    """Its own quantiser needs a GPU: a tensor is made of known numbers -8 to 7, the even position in the low bits."""
    from torchao.quantization import Int4Tensor

    numbers, scale, zero = integers(-8, 8, 6, 256).int(), *(random(2, 6, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    data = (numbers[:, ::2] & 15 | (numbers[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int8)
    layer = nn.Linear(256, 6, bias=False).bfloat16()
    layer.weight = nn.Parameter(Int4Tensor(data, scale, zero, [1, 128], torch.Size([6, 256])), requires_grad=False)
    wide = [x.t().float().repeat_interleave(128, 1) for x in (scale, zero)]
    assert packed(layer).dequantise(torch.float32).equal(numbers * wide[0] + wide[1])


def test_torchao_numbers_in_bytes_are_packed(torchao):
    """Of 4 bits with integer zeros, and of 8 bits; a width or a scale that kernels do not read is its own module's."""
    for bits, zeros in ((torch.int4, True), (torch.int4, False), (torch.int8, False)):
        kind = torchao.MappingType.ASYMMETRIC if zeros else torchao.MappingType.SYMMETRIC
        layer = quantised(torchao.IntxWeightOnlyConfig(bits, torchao.PerGroup(128), mapping_type=kind))
        assert bool(layer.weight.zero_point.any()) == zeros
        weight = packed(layer)
        assert weight.kind.startswith("int4 bfloat16" if bits == torch.int4 else "int8 in blocks")
        scale, zero = (x.float().repeat_interleave(128, 1) for x in (layer.weight.scale, layer.weight.zero_point))
        assert weight.dequantise(torch.float32).equal((layer.weight.qdata.float() - zero) * scale)
    for bits, group, why in ((torch.int2, 128, "no kernel for torch.int2"), (torch.int4, 8, "groups of 16")):
        assert why in read(quantised(torchao.IntxWeightOnlyConfig(bits, torchao.PerGroup(group)))).why
    wide = nn.Linear(256, 48, bias=False)
    torchao.quantize_(wide, torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(128)))
    assert "float32, not 16 bits" in read(wide).why


def test_torchao_layers_that_do_more_are_left_to_torchao(torchao):
    for config, why in (
        (torchao.Int8DynamicActivationInt8WeightConfig(), "quantises activations"),
        (torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()), None),
    ):
        reading = read(quantised(config))
        assert (reading.why or "").startswith("it quantises activations" if why else "")
        assert (reading.pack is None) == bool(why)
    layer = quantised(torchao.Int8WeightOnlyConfig())
    layer.register_forward_hook(lambda *_: None)
    assert "hooks" in read(layer).why
    assert read(nn.Linear(3, 4)) is None and read(nn.Embedding(3, 4)) is None


def test_activation_scales_per_tensor_are_refused_and_those_per_token_are_not(torchao):
    config = torchao.Float8DynamicActivationFloat8WeightConfig
    good, bad = (quantised(torchao.Int8DynamicActivationInt8WeightConfig()), nn.Sequential(nn.Identity()))
    require_token_scales(good)
    layer = nn.Linear(256, 32, bias=False).bfloat16()
    data = quantised(torchao.Int8DynamicActivationInt8WeightConfig()).weight.data
    data.act_quant_kwargs.granularity = torchao.PerTensor()
    layer.weight = nn.Parameter(data, requires_grad=False)
    bad.append(layer)
    with pytest.raises(ValueError, match="1 of Sequential .Int8Tensor. scales its 8-bit activations per tensor"):
        require_token_scales(bad)
    assert config is not None


class TorchQuantLinear(nn.Module):
    """What GPTQModel's module of this name holds."""

    def __init__(self, numbers: Tensor, scales: Tensor, zeros: Tensor, form: int = 2, order=None):
        super().__init__()
        inner, outputs = numbers.shape
        self.bits, self.in_features, self.out_features, self.bias, self.form = 4, inner, outputs, None, form
        words = gptq_words(numbers, zeros, less_one=form == 1) | {"scales": scales}
        for name, given in (words if order is None else words | {"g_idx": order}).items():
            self.register_buffer(name, given)

    def qzero_format(self):
        return self.form


class AwqTorchLinear(nn.Module):
    """What GPTQModel's module of this name, and AutoAWQ's WQLinear_GEMM, hold."""

    def __init__(self, numbers: Tensor, scales: Tensor, zeros: Tensor):
        super().__init__()
        self.bits, (self.in_features, self.out_features), self.bias = 4, numbers.shape, None
        for name, given in (awq_words(numbers, zeros) | {"scales": scales}).items():
            self.register_buffer(name, given)


def checkpoint(group: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers [in, out], scales and zeros [groups, out], and the matrix [out, in] that they stand for."""
    numbers, zeros = integers(0, 16, 256, 24).cpu(), integers(1, 16, 256 // group, 24, seed=1).cpu()
    scales = random(256 // group, 24, dtype=torch.float16, seed=2).cpu()
    wide = [x.repeat_interleave(group, 0) for x in (scales.float(), zeros)]
    return numbers, scales, zeros, (wide[0] * (numbers - wide[1])).t()


@pytest.mark.parametrize("form", [1, 2])
def test_gptq_layers_hold_zeros_as_they_are_or_less_one(form):
    numbers, scales, zeros, exact = checkpoint()
    assert packed(TorchQuantLinear(numbers, scales, zeros, form)).dequantise(torch.float32).equal(exact)


def test_awq_layers_interleave_outputs():
    numbers, scales, zeros, exact = checkpoint()
    assert packed(AwqTorchLinear(numbers, scales, zeros)).dequantise(torch.float32).equal(exact)


def test_gptq_layers_in_another_order_or_layout_are_left_to_their_module():
    numbers, scales, zeros, _ = checkpoint()
    order = torch.arange(256, dtype=torch.int32).flip(0) // 64
    assert "act-order" in read(TorchQuantLinear(numbers, scales, zeros, order=order)).why
    shuffled = TorchQuantLinear(numbers, scales, zeros)
    shuffled.__class__ = type("MarlinQuantLinear", (TorchQuantLinear,), {})
    assert "MarlinQuantLinear keeps weights in a layout of its own; its own module runs it" in read(shuffled).why
    assert "means 0 or 16" in read(TorchQuantLinear(numbers, scales, zeros.clamp(max=15) * 0 + 16, form=1)).why
    assert "float32" in read(TorchQuantLinear(numbers, scales.float(), zeros)).why
    eight = TorchQuantLinear(numbers, scales, zeros)
    eight.bits = 8
    assert "8 bits" in read(eight).why


def test_weights_that_were_packed_are_noticed_when_they_change():
    numbers, scales, zeros, _ = checkpoint()
    layers, made = [TorchQuantLinear(numbers, scales, zeros) for _ in range(2)], PackedWeights()
    assert made.of(layers, [read(layer) for layer in layers]).shape == (48, 256) and made.current()
    layers[1].scales.mul_(2)
    assert not made.current()
    other = TorchQuantLinear(*checkpoint(128)[:3])
    assert made.of([layers[0], other], [read(layers[0]), read(other)]) is None  # groups of another size
