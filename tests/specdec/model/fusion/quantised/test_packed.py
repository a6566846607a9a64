"""What packed weights stand for, number by number, and weights behind each other."""

import pytest
import torch

from specdec.model.fusion.quantised.packed import EightBitWeight, group_misfit, pack_int4
from tests.attention.devices import DEVICE
from tests.specdec.model.fusion.quantised.kinds import KINDS, integers, random, random_weight, step_of


@pytest.mark.parametrize("group", [16, 32, 64, 128, 192, 384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int4_gives_back_what_was_packed(group, dtype):
    """By the formulas of the docstring, in float32; zeros of 16 and negative scales too."""
    numbers, scales = integers(0, 16, 3, 768), random(3, 768 // group, dtype=dtype, seed=0)
    wide = scales.float().repeat_interleave(group, 1)
    for zeros in (integers(0, 17, *scales.shape), random(*scales.shape, dtype=dtype, seed=1)):
        weight, zero = pack_int4(numbers, scales, zeros, group), zeros.float().repeat_interleave(group, 1)
        exact = wide * (numbers - 8) + zero if zeros.is_floating_point() else wide * (numbers - zero)
        assert weight.dequantise(torch.float32).equal(exact) and weight.shape == (3, 768) == (len(weight), 768)
        assert weight.dequantise(torch.bfloat16).equal(exact.bfloat16())
        assert weight.nbytes == 3 * 768 // 2 + 4 * 3 * 768 // group


@pytest.mark.parametrize(("group", "span"), [(16, 16), (32, 16), (64, 32), (128, 32), (192, 32)])
def test_a_word_of_four_numbers_holds_positions_a_span_apart(group, span):
    numbers, ones = integers(0, 16, 1, 768, seed=5), torch.ones(1, 768 // group, device=DEVICE).half()
    values = pack_int4(numbers, ones, torch.zeros_like(ones), group).values
    for word in (0, span - 1, span, 191):
        first = word // span * 4 * span + word % span
        four = [int(numbers[0, first + part * span]) for part in range(4)]
        assert values[0, word].item() & 0xFFFF == sum(number << 4 * part for part, number in enumerate(four))


def test_eight_bits_have_a_scale_for_each_block_the_last_ones_smaller():
    values, scales = integers(-128, 128, 5, 7).to(torch.int8), torch.rand(3, 2, device=DEVICE)
    weight = EightBitWeight(values, scales, 2, 4)
    exact = values.float() * scales.repeat_interleave(2, 0)[:5].repeat_interleave(4, 1)[:, :7]
    assert weight.dequantise(torch.float32).equal(exact) and weight.kind == "int8 in blocks"
    fp8 = EightBitWeight(values.float().to(torch.float8_e4m3fn), torch.ones(5, 1, device=DEVICE), 1, 7)
    assert fp8.dequantise(torch.float16).equal(values.float().to(torch.float8_e4m3fn).half()) and fp8.kind == "fp8"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_join_along_outputs_and_divide_again(kind):
    inner = 2 * step_of(kind)
    for sizes in ((128, 256), (5, 130, 7)):
        weights = [random_weight(kind, outputs, inner) for outputs in sizes]
        expected = [weight.dequantise(torch.float32) for weight in weights]
        whole = weights[0].join(weights[1:])
        assert whole.kind == weights[0].kind and whole.dequantise(torch.float32).equal(torch.cat(expected))
        assert [weight.dequantise(torch.float32).equal(plain) for weight, plain in zip(weights, expected, strict=True)]
        for rows in (sizes[0], sum(sizes[:2])):
            assert whole[:rows].dequantise(torch.float32).equal(torch.cat(expected)[:rows])
            assert whole[:rows].values.data_ptr() == whole.values.data_ptr()


def test_eight_bits_are_not_stored_twice():
    one, two = (random_weight("int8", 4, 8) for _ in range(2))
    whole = one.join([two])
    assert one.values.data_ptr() == whole.values.data_ptr() and two.values.data_ptr() == whole.values[4:].data_ptr()
    assert one.join([two]).values.data_ptr() == whole.values.data_ptr()  # found where they are


def test_what_does_not_fit_is_refused():
    for inner, group, why in (
        (96, 32, "in blocks of 64"),
        (48, 16, "in blocks of 32"),
        (100, 32, "do not divide"),
        (96, 96, "multiples of 64"),
        (64, 8, "16"),
    ):
        assert why in group_misfit(inner, group)
        with pytest.raises(ValueError, match=why):
            pack_int4(integers(0, 16, 1, inner), random(1, 1, dtype=torch.half, seed=0), integers(0, 16, 1, 1), group)
    assert not any(group_misfit(*sizes) for sizes in ((64, 32), (384, 192), (512, 512), (32, 16)))
    with pytest.raises(ValueError, match="16-bit scales"):
        pack_int4(integers(0, 16, 1, 64), torch.ones(1, 2, device=DEVICE), integers(0, 16, 1, 2), 32)
    with pytest.raises(ValueError, match="a scale for each 2 x 4 of 5 x 7 numbers"):
        EightBitWeight(integers(0, 9, 5, 7).to(torch.int8), torch.ones(2, 2), 2, 4)
    with pytest.raises(ValueError, match="int8 or e4m3"):
        EightBitWeight(integers(0, 9, 5, 7), torch.ones(5, 1), 1, 7)
    with pytest.raises(ValueError, match="of one kind"):
        random_weight("int8", 4, 128).join([random_weight("fp8", 4, 128)])
    with pytest.raises(ValueError, match="of one kind"):
        random_weight("int4 32 float16 z", 4, 128).join([random_weight("int4 32 float16 s", 4, 128)])
