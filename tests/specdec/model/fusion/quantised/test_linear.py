"""Products of few rows with packed weights against dequantised ones, on a GPU or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor, nn

from attention.dispatch import triton_available
from specdec.model.fusion.product_inputs import MAX_ROWS, Norm
from specdec.model.fusion.quantised.linear import matrix_of, quantised_linear, quantised_linear_and_norm
from specdec.model.fusion.quantised.packed import EightBitWeight
from tests.attention.devices import DEVICE, LOW_PRECISION
from tests.specdec.model.fusion.quantised.kinds import KINDS, integers, random, random_weight, step_of

needs_triton = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
MOST = 2.5e-3  # error of a product against the dequantised numbers; bfloat16 results alone have 1.7e-3


def error(out: Tensor, x: Tensor, weight, bias: Tensor | None, added: Tensor | None = None) -> float:
    exact = nn.functional.linear(x.double(), weight.dequantise(torch.float64), None if bias is None else bias.double())
    exact = exact if added is None else exact + added.double()
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.covering
@needs_triton
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 17, MAX_ROWS])
@pytest.mark.parametrize("kind", KINDS)
def test_is_as_close_as_the_reference(kind, rows, dtype):
    """Outputs are no multiple of a tile; rows are cut out of what else is NaN. The largest has all that is added."""
    for outputs, steps in ((1, 1), (37, 3), (130, 5)):
        inner = max(1, steps * step_of(kind)) if step_of(kind) > 1 else (1, 113, 640)[steps // 2]
        weight = random_weight(kind, outputs, inner)
        x = torch.full((rows + 1, inner), float("nan"), dtype=dtype, device=DEVICE)[:rows]
        x = x.copy_(random(rows, inner, dtype=dtype, seed=1))[None]
        added = torch.full((rows, outputs + 1), float("nan"), dtype=dtype, device=DEVICE)[None, :, 1:]
        added.copy_(random(rows, outputs, dtype=dtype, seed=3))
        for bias, other in ((random(outputs, dtype=dtype, seed=2), added), *([(None, None)] if outputs < 130 else [])):
            out = quantised_linear(x, weight, bias, other, "triton")
            plain = quantised_linear(x, weight, bias, other, "reference")
            assert out.shape == (1, rows, outputs) and out.dtype == dtype
            found, of_reference = (error(given, x, weight, bias, other) for given in (out, plain))
            assert found <= 1.1 * of_reference + 4e-4
            assert found <= MOST or out.numel() < 32  # few numbers may all be rounded by almost half a step


@pytest.mark.covering
@needs_triton
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_of_many_rows_is_the_reference(kind, dtype):
    """Number by number; a zero that is no integer may be added before the product is rounded to float32."""
    for outputs, steps in ((1, 1), (37, 3), (6, 11)):
        inner = max(1, steps * step_of(kind)) if step_of(kind) > 1 else (1, 113, 640)[steps // 4]
        weight = random_weight(kind, outputs, inner)
        found, exact = matrix_of(weight, dtype, "triton"), weight.dequantise(dtype)
        assert found.dtype == dtype and found.shape == (outputs, inner)
        if kind.endswith("s"):
            torch.testing.assert_close(found, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
        else:
            assert found.equal(exact)
        x = random(MAX_ROWS + 3, inner, dtype=dtype, seed=1)
        assert quantised_linear(x, weight).equal(nn.functional.linear(x, found if DEVICE == "cuda" else exact))
    with pytest.raises(ValueError, match="16-bit numbers, got torch.float32"):
        matrix_of(weight, torch.float32, "triton")


@pytest.mark.covering
@needs_triton
@pytest.mark.parametrize("kind", ["int8", "fp8 128x128", "int4 32 float16 s", "int4 128 bfloat16 z"])
@pytest.mark.parametrize("rows", [2, 8, 9, 40])
def test_a_row_depends_on_no_other_and_repeats_bit_for_bit(kind, rows, monkeypatch):
    from specdec.model.fusion.quantised import linear_kernel

    monkeypatch.setattr(linear_kernel, "multiprocessors", lambda _: 4)  # so that tiles are split
    weight, x = random_weight(kind, 40, 512), random(rows, 512, dtype=torch.float16, seed=0)
    out = quantised_linear(x, weight, impl="triton")
    others = torch.cat([x[:1], random(rows - 1, 512, dtype=torch.float16, seed=1) * 100])
    assert quantised_linear(others, weight, impl="triton")[0].equal(out[0])
    if DEVICE == "cuda":  # the interpreter's NumPy may add a row elsewhere up in another order
        assert quantised_linear(x.flip(0), weight, impl="triton").flip(0).equal(out)
    assert all(quantised_linear(x, weight, impl="triton").equal(out) for _ in range(2))


@needs_triton
def test_every_number_of_eight_bits_is_exact():
    """Each of the 256 bytes but NaN, by the identity; the largest and the least e4m3 numbers too."""
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE)[:, None].repeat(1, 2)
    for values in (every.view(torch.int8), every.view(torch.float8_e4m3fn)):
        weight = EightBitWeight(values, torch.ones(256, 1, device=DEVICE), 1, 2)
        for rows in (1, 2, 9):
            x = torch.tensor([[1.0, 0.0]], dtype=torch.float16, device=DEVICE).repeat(rows, 1)
            out, exact = quantised_linear(x, weight, impl="triton")[0], values[:, 0].to(torch.float16)
            assert out[exact.isfinite()].equal(exact[exact.isfinite()])


@pytest.mark.covering
@needs_triton
@pytest.mark.parametrize("kind", ["int8", "fp8 128x128", "int4 128 float16 z"])
@pytest.mark.parametrize(("rows", "split"), [(1, False), (8, False), (17, True), (64, True)])
def test_a_norm_comes_with_a_product_in_parts_and_changes_nothing(kind, rows, split, monkeypatch):
    from specdec.model.fusion.pointwise_kernel import rms_norm
    from specdec.model.fusion.quantised import linear_kernel

    monkeypatch.setattr(linear_kernel, "multiprocessors", lambda _: 4)
    weight, x = random_weight(kind, 40, 1536), random(1, rows, 1536, dtype=torch.float16, seed=0)
    added, norm = (
        random(1, rows, 40, dtype=torch.float16, seed=1),
        Norm(random(40, dtype=torch.half, seed=3), 1e-5, False),
    )
    out, normed = quantised_linear_and_norm(x, weight, None, added, norm, "triton")
    assert out.equal(quantised_linear(x, weight, None, added, "triton")) and (normed is not None) == split
    if split:  # squares may be added in another order
        torch.testing.assert_close(normed, rms_norm(out, *norm), rtol=2 * torch.finfo(torch.float16).eps, atol=1e-6)
    assert quantised_linear_and_norm(x, weight, None, added, norm, "reference")[1] is None


@needs_triton
def test_first_outputs_alone_and_none():
    x = random(3, 256, dtype=torch.float16, seed=0)
    for kind in KINDS[:3] + ["int4 32 float16 z"]:
        weight = random_weight(kind, 150, 256)
        assert quantised_linear(x, weight[:140], impl="triton").equal(
            quantised_linear(x, weight, impl="triton")[:, :140]
        )
        assert quantised_linear(x, weight[:0], impl="triton").shape == (3, 0)


@needs_triton
def test_what_the_kernel_cannot_do_is_pytorchs_and_an_error_by_name():
    weight = random_weight("int8", 8, 16)
    wanted = random(2, 16, dtype=torch.float16, seed=1).requires_grad_()
    for x, w, why in (
        (random(2, 16, dtype=torch.float32, seed=1), weight, "16-bit"),
        (random(MAX_ROWS + 1, 16, dtype=torch.float16, seed=1), weight, "rows"),
        (random(0, 16, dtype=torch.float16, seed=1), weight, "rows"),
        (wanted, weight, "gradient"),
        (
            random(2, 100, dtype=torch.float16, seed=1),
            random_weight("fp8 128x64", 8, 100),
            "blocks of 64 inner positions",
        ),
        (random(2, 96, dtype=torch.float16, seed=1), random_weight("int8 1x32", 8, 96), "multiple of 64"),
        (random(2, 96, dtype=torch.float16, seed=1), random_weight("int4 16 float16 z", 8, 96), "blocks of 64"),
    ):
        assert quantised_linear(x, w).equal(nn.functional.linear(x, w.dequantise(x.dtype)))
        with pytest.raises(ValueError, match=why):
            quantised_linear(x, w, impl="triton")
    x = random(2, 16, dtype=torch.float16, seed=1)
    for arguments in ((x[:, :8], weight), (x, weight, random(1, dtype=torch.float16, seed=2))):
        with pytest.raises(ValueError, match="shapes must fit"):
            quantised_linear(*arguments, impl="triton")
    with pytest.raises(ValueError, match=r"product's shape \[2, 8\], got \[1, 8\]"):
        quantised_linear(x, weight, added=x[:1, :8], impl="triton")
    with pytest.raises(ValueError, match="impl='cublas'"):
        quantised_linear(x, weight, impl="cublas")


@pytest.mark.gpu
def test_more_numbers_than_32_bits_can_count():
    outputs, inner = (1 << 31) // 16384 + 64, 16384
    weight = EightBitWeight(
        torch.zeros(outputs, inner, dtype=torch.int8, device="cuda"), torch.ones(outputs, 1, device="cuda"), 1, inner
    )
    weight.values[-64:] = integers(-127, 128, 64, inner)
    for rows in (1, 4, 40):
        x = random(rows, inner, dtype=torch.bfloat16, seed=1)
        out = quantised_linear(x, weight, impl="triton")
        tail = EightBitWeight(weight.values[-64:], weight.scales[-64:], 1, inner)
        assert not out[:, :-64].any() and error(out[:, -64:], x, tail, None) < MOST
