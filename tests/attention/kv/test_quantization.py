"""The 8-bit formats against their own definition in float64, and the rows that break naive code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.kv.quantization import dequantise, largest, quantise, storage_dtype

FORMATS = ["int8", "fp8"]
TOP = {"int8": 127.0, "fp8": 448.0}
every_format = pytest.mark.parametrize("kv_dtype", FORMATS)


def grid(kv_dtype: str) -> torch.Tensor:
    """Every number that the format stores, in float64 and rising order. e4m3: sign, 4 bits of exponent with bias 7, 3
    of mantissa.
    """
    if kv_dtype == "int8":
        return torch.arange(-127, 128, dtype=torch.float64)
    positive = {m / 8 * 2.0**-6 for m in range(8)} | {
        (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
    }
    return torch.tensor(sorted({sign * x for x in positive for sign in (1, -1)}), dtype=torch.float64)


def nearest(kv_dtype: str, x: torch.Tensor) -> torch.Tensor:
    """How far `x` (float64) is from the format's nearest number."""
    numbers = grid(kv_dtype)
    right = torch.searchsorted(numbers, x).clamp(1, len(numbers) - 1)
    return torch.minimum((x - numbers[right - 1]).abs(), (x - numbers[right]).abs())


@every_format
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 3e4, 1e37])
def test_each_number_is_the_nearest_that_the_format_has(kv_dtype, magnitude):
    x = torch.randn(113, 80, generator=torch.Generator().manual_seed(1)) * magnitude
    q, scale = quantise(x, kv_dtype)
    assert q.dtype == storage_dtype(kv_dtype, x.dtype) and scale.dtype == torch.float32 and scale.shape == (113,)
    torch.testing.assert_close(scale.double(), x.double().abs().amax(-1) / TOP[kv_dtype], rtol=2e-7, atol=0)
    exact = x.double() / scale.double()[:, None]
    error = (q.double() - exact).abs()
    assert (error <= nearest(kv_dtype, exact) + 1e-4).all()
    assert (q.double().abs().amax(-1) == TOP[kv_dtype]).all(), "the largest number of a row uses the whole range"


@every_format
def test_the_error_is_what_the_docstring_says(kv_dtype):
    x = torch.randn(339, 64, generator=torch.Generator().manual_seed(2))
    back, amax = dequantise(*quantise(x, kv_dtype)), x.abs().amax(-1, keepdim=True)
    bound = amax / 254 if kv_dtype == "int8" else torch.maximum(x.abs() / 16, amax / 2**18)
    assert ((back - x).abs() <= bound * 1.00001).all()
    assert (back - x).abs().max() > bound.max() / 4, "the bound is not far from what happens"


def test_ties_go_to_the_even_number():
    q, scale = quantise(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), "int8")
    assert scale.item() == 1 and q.tolist() == [[127, 0, 2, 2, 0, -2]]
    q, scale = quantise(torch.tensor([[448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]]), "fp8")
    assert scale.item() == 1 and q.float().tolist() == [[448.0, 16.0, 20.0, 0.0, 2.0**-8]]


@every_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_every_type_are_taken(kv_dtype, dtype):
    x = torch.linspace(-3, 3, 96).view(2, 3, 16).to(dtype)
    q, scale = quantise(x, kv_dtype)
    in_float, float_scale = quantise(x.float(), kv_dtype)
    assert torch.equal(q.view(torch.uint8), in_float.view(torch.uint8)) and torch.equal(scale, float_scale)


@every_format
@pytest.mark.parametrize("number", [0.0, 1e-45, -1e-40, 1.1e-38, 3.4e38])
def test_rows_of_zeros_and_of_extreme_numbers_stay_finite(kv_dtype, number):
    x = torch.full((2, 17), number)
    back = dequantise(*quantise(x, kv_dtype))
    assert back.isfinite().all() and (back - x).abs().max() <= max(abs(number) / 16, 2.0**-126)


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_does_not_come_back_as_a_number(kv_dtype, bad):
    x = torch.ones(3, 8)
    x[1, 5] = bad
    back = dequantise(*quantise(x, kv_dtype))
    assert back[0].isfinite().all() and back[2].isfinite().all() and not back[1, 5].isfinite()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9), st.sampled_from(FORMATS))
def test_quantising_again_changes_nothing(row, kv_dtype):
    """What is stored is a fixed point: a page may be read and written again without drifting."""
    once = dequantise(*quantise(torch.tensor(row), kv_dtype))
    twice = dequantise(*quantise(once, kv_dtype))
    torch.testing.assert_close(twice, once, rtol=3e-7, atol=2.0**-126)


def test_an_unknown_format_is_refused_by_name():
    assert storage_dtype(None, torch.float16) == torch.float16 and [largest(name) for name in FORMATS] == list(
        TOP.values()
    )
    with pytest.raises(ValueError, match="'int4'"):
        storage_dtype("int4", torch.float32)
