"""Weights rounded to the nearest of few numbers."""

import pytest
import torch

from specdec.model.fusion.quantised import rounding
from specdec.model.fusion.quantised.packed_linear import PackedLinear
from specdec.model.fusion.quantised.readers import read
from specdec.model.fusion.quantised.rounding import round_to_nearest, rounding_misfit
from tests.attention.devices import DEVICE
from tests.specdec.model.fusion.quantised.kinds import random


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_four_bits_are_the_nearest_number_of_each_groups_grid(group, dtype):
    """Against all 16 numbers of the grid that scale and zero give; zero is one of them, and so is a group of zeros."""
    weight = random(5, 256, dtype=dtype, seed=3) * 0.02
    weight[1], weight[2], weight[3, :16] = weight[1].abs() + 0.1, -weight[2].abs() - 0.1, 0.0
    packed = round_to_nearest(weight, 4, group)
    assert packed.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype) and not packed.shifted
    found = packed.dequantise(torch.float32).unflatten(1, (-1, group))
    words = packed.scales.unflatten(1, (-1, 1)).expand(found.shape)
    scale = (words << 16 >> 16).to(torch.int16).view(packed.dtype).float()
    zero, wide = words >> 16, weight.float().unflatten(1, (-1, group))
    grid = scale[..., None] * (torch.arange(16, device=DEVICE) - zero[..., None])
    assert (grid == 0).any(-1).all(), "zero is on the grid"
    nearest = (grid - wide[..., None]).abs().amin(-1)
    torch.testing.assert_close((found - wide).abs(), nearest, rtol=0, atol=1e-6)
    span = wide.amax(-1).clamp(min=0) - wide.amin(-1).clamp(max=0)
    assert ((found - wide).abs().amax(-1) <= 0.51 * span / 15 + 0.005 * span).all(), "half a step, and a rounded scale"
    assert (found.flatten(1)[3, :16] == 0).all()


@pytest.mark.parametrize("group", [64, 256])
def test_eight_bits_are_off_by_half_a_scale_at_most(group):
    weight = random(5, 256, dtype=torch.float32, seed=3)
    weight[2, :64] = 0.0
    packed = round_to_nearest(weight, 8, group)
    scales = weight.unflatten(1, (-1, group)).abs().amax(-1) / 127
    error = (packed.dequantise(torch.float32) - weight).abs().unflatten(1, (-1, group)).amax(-1)
    assert packed.scales.shape == (5, 256 // group) and (error <= scales * 0.5001).all()
    assert (packed.dequantise(torch.float32)[2, :64] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_large_matrix_is_rounded_in_parts_to_the_same_numbers(bits, monkeypatch):
    weight = random(7, 128, dtype=torch.float32, seed=0)
    whole = round_to_nearest(weight, bits, 128)
    monkeypatch.setattr(rounding, "AT_ONCE", 256)
    parts = round_to_nearest(weight, bits, 128)
    assert parts.values.equal(whole.values) and parts.scales.equal(whole.scales)


def test_what_cannot_be_rounded_is_said():
    assert "do not divide into groups of 128" in rounding_misfit(432, 4, 128)
    assert "in blocks of 64" in rounding_misfit(32, 4, 32) and rounding_misfit(128, 4, 128) is None
    assert "do not divide into groups of 64" in rounding_misfit(96, 8, 64) and rounding_misfit(19, 8, 19) is None
    with pytest.raises(ValueError, match="bits=3"):
        rounding_misfit(128, 3, 128)
    for bits, group in ((4, 24), (4, 8), (8, 0), (4, 32.0)):
        with pytest.raises(ValueError, match=f"got {group}"):
            rounding_misfit(128, bits, group)
    with pytest.raises(ValueError, match="do not divide"):
        round_to_nearest(torch.ones(2, 100), 4, 128)
    for bits in (4, 8):
        with pytest.raises(ValueError, match="not finite"):
            round_to_nearest(torch.full((2, 128), float("nan")), bits, 128)


def test_a_packed_layer_multiplies_by_what_its_weight_stands_for_and_is_read_as_such():
    x, bias = random(3, 256, dtype=torch.float32, seed=1), torch.nn.Parameter(torch.ones(8, device=DEVICE))
    for bits, group in ((4, 128), (8, 256), (8, 64)):
        weight = round_to_nearest(random(8, 256, dtype=torch.float32, seed=2), bits, group)
        layer = PackedLinear(weight, bias)
        torch.testing.assert_close(layer(x), x @ weight.dequantise(torch.float32).T + 1)
        assert read(layer).pack().values is layer.values and read(layer).kind == weight.kind
        layer.register_forward_hook(lambda *_: None)
        assert read(layer).pack is None and "hooks" in read(layer).why


def test_packed_layers_that_are_joined_share_the_memory_of_the_whole():
    """So that kernels may read q, k and v as one matrix without a second copy."""
    first, second = (
        PackedLinear(round_to_nearest(random(8, 256, dtype=torch.float32, seed=seed), 4, 128)) for seed in (0, 1)
    )
    parts = [layer.packed.dequantise(torch.float32) for layer in (first, second)]
    whole = first.packed.join([second.packed])
    assert whole.dequantise(torch.float32).equal(torch.cat(parts))
    for name in ("values", "scales"):
        starts = [getattr(layer, name).untyped_storage().data_ptr() for layer in (first, second, whole)]
        assert len(set(starts)) == 1
    for layer, part in zip((first, second), parts, strict=True):
        assert layer.packed.dequantise(torch.float32).equal(part)
