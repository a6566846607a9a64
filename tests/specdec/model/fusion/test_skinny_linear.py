"""Products of few rows against PyTorch's, on a GPU or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor, nn

from attention.dispatch import triton_available
from specdec.model.fusion.product_inputs import MAX_ROWS, Norm
from specdec.model.fusion.skinny_linear import skinny_linear, skinny_linear_and_norm
from tests.attention.devices import DEVICE, LOW_PRECISION

needs_triton = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None) -> float:
    exact = nn.functional.linear(*(None if t is None else t.double() for t in (x, weight, bias)))
    exact = exact if added is None else exact + added.double()
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.covering
@needs_triton
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 17, 33, MAX_ROWS])
@pytest.mark.parametrize("outputs, inner", [(1, 1), (17, 113), (63, 128), (40, 339), (34, 1536), (5, 2560), (390, 70)])
def test_is_as_close_as_pytorch(outputs, inner, rows, dtype):
    """Weights and rows are cut out of what else is NaN."""
    weight = torch.full((outputs + 2, inner + 3), float("nan"), dtype=dtype, device=DEVICE)[1:-1, 1:-2]
    weight.copy_(random(outputs, inner, dtype=dtype, seed=0))
    x = torch.full((rows + 1, inner), float("nan"), dtype=dtype, device=DEVICE)[:rows].copy_(
        random(rows, inner, dtype=dtype, seed=1)
    )[None]
    added = torch.full((rows, outputs + 1), float("nan"), dtype=dtype, device=DEVICE)[None, :, 1:]
    added.copy_(random(rows, outputs, dtype=dtype, seed=3))
    for bias, other in (
        (None, None),
        (random(outputs, dtype=dtype, seed=2), None),
        (None, added),
        (random(outputs, dtype=dtype, seed=2), added),
    ):
        out, plain = (
            skinny_linear(x, weight, bias, "triton", other),
            skinny_linear(x, weight, bias, "reference", other),
        )
        assert out.shape == (1, rows, outputs) and out.dtype == dtype
        assert error(out, x, weight, bias, other) <= 2 * error(plain, x, weight, bias, other) + 1e-7


@pytest.mark.covering
@needs_triton
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "inner", "split"),
    [
        (1, 64, 512, False),
        (8, 64, 512, False),
        (9, 40, 512, True),
        (33, 63, 339, True),
        (64, 64, 1536, True),
        (17, 64, 100, False),
        (9, 390, 512, False),
    ],
)
def test_a_norm_comes_with_a_product_in_parts_and_changes_nothing(rows, outputs, inner, split, offset, monkeypatch):
    """The norm of the sum, which stays as it was."""
    from specdec.model.fusion import skinny_linear_kernel as skinny_linear_kernel
    from specdec.model.fusion.pointwise_kernel import rms_norm

    monkeypatch.setattr(skinny_linear_kernel, "multiprocessors", lambda _: 4)
    x, weight, added = (
        random(*shape, dtype=torch.float16, seed=seed)
        for seed, shape in enumerate(((1, rows, inner), (outputs, inner), (1, rows, outputs)))
    )
    norm = Norm(random(outputs, dtype=torch.float16, seed=3), 1e-5, offset)
    for bias, other in ((None, added), (random(outputs, dtype=torch.float16, seed=4), None)):
        out, normed = skinny_linear_and_norm(x, weight, bias, other, norm, "triton")
        assert out.equal(skinny_linear(x, weight, bias, "triton", other)) and (normed is not None) == split
        if split:  # squares may be added in another order
            torch.testing.assert_close(normed, rms_norm(out, *norm), rtol=2 * torch.finfo(torch.float16).eps, atol=1e-6)
    assert skinny_linear_and_norm(x, weight, None, added, norm, "reference")[1] is None


@needs_triton
def test_rows_may_lie_apart():
    x, weight = random(6, 4, 64, dtype=torch.float16, seed=0)[:, 1], random(8, 64, dtype=torch.float16, seed=1)
    torch.testing.assert_close(
        skinny_linear(x, weight, impl="triton"), nn.functional.linear(x, weight), rtol=1e-3, atol=1e-2
    )


@needs_triton
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_a_matrix_without_rows_gives_nothing(rows):
    x = random(rows, 16, dtype=torch.float16, seed=0)
    assert skinny_linear(x, x.new_empty(0, 16), impl="triton").shape == (rows, 0)


@needs_triton
def test_what_the_kernel_cannot_do_is_pytorchs_and_an_error_by_name():
    weight = random(8, 16, dtype=torch.float16, seed=0)
    for x, w, why in (
        (random(2, 16, dtype=torch.float32, seed=1), weight.float(), "16-bit"),
        (random(MAX_ROWS + 1, 16, dtype=torch.float16, seed=1), weight, "rows"),
        (random(0, 16, dtype=torch.float16, seed=1), weight, "rows"),
        (random(2, 8, dtype=torch.float16, seed=1), weight.T, "contiguous"),
        (random(2, 16, dtype=torch.float16, seed=1), weight.clone().requires_grad_(), "gradient"),
    ):
        assert skinny_linear(x, w).equal(nn.functional.linear(x, w))
        with pytest.raises(ValueError, match=why):
            skinny_linear(x, w, impl="triton")
    x, apart = random(2, 16, dtype=torch.float16, seed=1), random(16, dtype=torch.float16, seed=2)[::2]
    assert skinny_linear(x, weight, apart).equal(nn.functional.linear(x, weight, apart))
    with pytest.raises(ValueError, match=r"product's shape \[2, 8\], got \[1, 8\]"):
        skinny_linear(x, weight, impl="triton", added=x[:1, :8])
    for args in ((x, weight, apart), (x[:, :8], weight), (x, weight, random(1, dtype=torch.float16, seed=2))):
        with pytest.raises(ValueError, match="shapes must fit"):
            skinny_linear(*args, impl="triton")
    with pytest.raises(RuntimeError, match="shapes"):
        skinny_linear(x[:, :8], weight)
    with pytest.raises(ValueError, match="impl='cublas'"):
        skinny_linear(weight, weight, impl="cublas")


@pytest.mark.gpu
def test_more_weights_than_32_bits_can_count():
    inner = 16384
    weight = torch.zeros((1 << 31) // inner + 64, inner, dtype=torch.bfloat16, device="cuda")
    weight[-64:] = random(64, inner, dtype=torch.bfloat16, seed=0)
    for rows in (1, 4, 40):
        x = random(rows, inner, dtype=torch.bfloat16, seed=1)
        out = skinny_linear(x, weight, impl="triton")
        assert not out[:, :-64].any() and error(out[:, -64:], x, weight[-64:], None) < 4e-3


@needs_triton
@pytest.mark.gpu
def test_a_recording_follows_what_was_written_just_before(monkeypatch):
    """Kernels that start early still wait for their input: the same as without."""
    from attention import pdl_kernel as overlap_kernel

    weights = [random(2048, 2048, dtype=torch.bfloat16, seed=seed) / 45 for seed in range(4)]
    for rows in (1, 6, 64):
        x, graph = random(rows, 2048, dtype=torch.bfloat16, seed=9), torch.cuda.CUDAGraph()

        def chain(x=x):
            for weight in weights * 8:
                x = skinny_linear(x, weight, impl="triton")
            return x

        chain()
        with torch.cuda.graph(graph):
            out = chain()
        with monkeypatch.context() as patch:
            patch.setattr(overlap_kernel, "_can_overlap", lambda _: False)
            for seed in range(20):
                x.copy_(random(rows, 2048, dtype=torch.bfloat16, seed=seed))
                graph.replay()
                assert out.equal(chain())
