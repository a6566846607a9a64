"""Kernels in C of recordings, against the PyTorch functions that specify them."""

import pytest
import torch
from torch import Tensor, nn

from attention.native.library import why_unavailable
from attention.recording import Recording, current
from specdec.model.fusion import native, pointwise_cpu, pointwise_reference
from specdec.model.fusion.skinny_linear import skinny_linear, skinny_linears
from tests.families import CONFIGS, build

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels in C: {why_unavailable()}")
WIDTHS = [1, 7, 16, 50, 64, 113, 192, 339]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def within_nan(x: Tensor) -> Tensor:
    """`x` cut out of memory that is NaN, with a distance between its rows."""
    around = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    inside = around[..., 1:-1, 1:-2]
    return inside.copy_(x)


def in_c(function, length: int = 1):
    """What a recording computes in its second run, with kernels in C alone."""
    recording = Recording(function, native=True)
    assert len(recording) == length
    with torch.inference_mode():
        for x in recording.result if isinstance(recording.result, tuple) else [recording.result]:
            x.fill_(float("nan"))
    recording.replay()
    return recording.result


def errors(out: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    return tuple(float((x.double() - exact).norm() / exact.norm()) for x in (out, plain))


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 33, native.MAX_ROWS])
@pytest.mark.parametrize("outputs, inner", [(1, 1), (17, 113), (63, 128), (40, 339), (34, 1536), (390, 70), (3, 16)])
def test_products_are_as_close_as_pytorch_s(outputs, inner, rows, dtype):
    weight = within_nan(random(outputs, inner, dtype=dtype))
    x, other = (within_nan(random(rows, width, seed=seed, dtype=dtype)) for width, seed in ((inner, 1), (outputs, 2)))
    added = other.clone()[None]
    for bias in (None, random(outputs, seed=3, dtype=dtype)):
        exact = nn.functional.linear(*(None if t is None else t.double() for t in (x, weight, bias)))
        for plus in (None, added):
            run = lambda bias=bias, plus=plus: skinny_linear(x[None], weight, bias, None, plus)
            out, plain = in_c(run), run()
            assert out.shape == (1, rows, outputs) and out.dtype == dtype
            ours, theirs = errors(out[0], plain[0], exact if plus is None else exact + plus[0].double())
            assert ours <= 2 * theirs + 1e-7


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_a_row_s_product_depends_on_no_other_row(dtype):
    weight, x = random(40, 339, dtype=dtype), random(23, 339, seed=1, dtype=dtype)
    whole = in_c(lambda: skinny_linear(x, weight))
    for rows in (1, 2, 3, 5, 6, 11):
        assert in_c(lambda rows=rows: skinny_linear(x[-rows:], weight)).equal(whole[-rows:])


def test_threads_change_no_bit():
    weight, x, before = random(390, 339), random(6, 339, seed=1), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(in_c(lambda: skinny_linear(x, weight)).clone())
    finally:
        torch.set_num_threads(before)
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [False, True])
def test_norms(width, offset):
    weight = random(width, seed=1)
    for x in (within_nan(random(5, width)), within_nan(random(2, 3, width)), random(3, 2, width).transpose(0, 1)):
        run = lambda x=x: pointwise_cpu.rms_norm(x, weight, 1e-6, offset)
        exact = pointwise_reference.rms_norm(x.double(), weight.double(), 1e-6, offset)
        exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + offset)
        ours, theirs = errors(in_c(run), run(), exact)
        assert ours <= 2 * theirs + 1e-7


@pytest.mark.parametrize("width", [2, 6, 16, 32, 64, 96])
def test_rotations(width):
    heads, groups, tokens = 6, 2, 5
    joined = random(1, tokens, (heads + 2 * groups) * width).view(1, tokens, -1, width).transpose(1, 2)
    q, k = joined[:, :heads], joined[:, heads : heads + groups]
    cos, sin = within_nan(random(1, tokens, 2 * width, seed=1)).chunk(2, -1)
    for a, b, length in ((q, k, 1), (q.contiguous(), k.contiguous(), 1)):
        expected = pointwise_reference.rotate(a, b, cos, sin)
        for ours, theirs in zip(
            in_c(lambda a=a, b=b: pointwise_cpu.rotate(a, b, cos, sin), length), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", pointwise_reference.ACTIVATIONS)
def test_gates(width, activation):
    for scale in (1.0, 30.0, 1000.0):
        both = within_nan(random(3, 2 * width) * scale)
        exact = pointwise_reference.gate(both.double(), activation)
        run = lambda both=both: pointwise_cpu.gate(both, activation)
        ours, theirs = errors(in_c(run), run(), exact)
        assert ours <= 2 * theirs + 2e-7


def test_what_is_not_finite_stays_so():
    """A model that breaks is noticed by its logits."""
    broken = torch.tensor([[float("nan"), float("inf"), 1.0, 2.0]])
    assert in_c(lambda: pointwise_cpu.gate(broken, "silu"))[0, 0].isnan()
    assert not in_c(lambda: pointwise_cpu.gate(broken, "silu"))[0, 1].isfinite()
    assert in_c(lambda: pointwise_cpu.rms_norm(broken, torch.ones(4), 1e-6, False)).isnan().all()
    assert not in_c(lambda: skinny_linear(broken, torch.ones(2, 4))).isfinite().any()


NORM = lambda x, weight: pointwise_cpu.rms_norm(x, weight, 1e-6, False)


@pytest.mark.parametrize(
    "function, inputs",
    [
        (skinny_linear, (random(2, 4).double(), random(3, 4).double())),
        (skinny_linear, (random(native.MAX_ROWS + 1, 1024), random(1032, 1024))),
        (skinny_linear, (random(2, 4), random(4, 3).t())),
        (NORM, (random(2, 4).bfloat16(), random(4).bfloat16())),
        (NORM, (random(2, 3, 2, 4).transpose(0, 2), random(4))),
        (lambda both: pointwise_cpu.gate(both, "silu"), (random(2, 4).double(),)),
    ],
    ids=["fp64", "many rows", "weights by columns", "a bf16 norm", "a norm over three dimensions", "an fp64 gate"],
)
def test_what_no_kernel_takes_runs_as_operations(function, inputs, monkeypatch):
    taken = []
    for name in ("linear", "rms_norm", "gate"):
        own = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *given, own=own: taken.append(own(*given)))
    torch.testing.assert_close(Recording(lambda: function(*inputs), native=True).result, function(*inputs))
    assert taken == [None]


@pytest.mark.parametrize("cos", [random(1, 1, 8), random(1, 3, 4), random(1, 3, 8)[:, :2]])
def test_angles_of_other_shapes_are_not_read(cos):
    x, weight, found = random(1, 2, 3, 8), random(4), []
    Recording(lambda: found.append(native.rotate(current(), x, cos, cos)), native=True)
    Recording(lambda: found.append(native.rms_norm(current(), x, weight, 1e-6, False)), native=True)
    assert found == [None, None]


def test_the_memory_of_projections_side_by_side_is_counted_once():
    x, weights = random(3, 8), [random(4, 8), random(6, 8), random(2, 8)]
    recording = Recording(lambda: skinny_linears(x, weights, [None] * 3), native=True)
    assert recording.bytes == 3 * 12 * 4
    torch.testing.assert_close(recording.result, x @ torch.cat(weights).t())


@pytest.mark.seam
def test_weights_that_lie_otherwise_at_the_same_place_are_noticed():
    import specdec

    model, ids = build("llama"), torch.tensor([[5, 6, 7, 8]])
    generator = specdec.AutoregressiveGenerator(model)
    generator.generate(ids, max_new_tokens=8)
    weight = model.model.layers[0].self_attn.o_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.t()
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)
    assert generator.generate(ids, max_new_tokens=8).sequences.equal(expected)


@pytest.mark.seam
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_every_family_equal_the_model_s_own(name):
    """A forward over new tokens in mode "compile", replayed, against transformers' forward over the whole text."""
    import specdec

    model = build(name)
    model.set_attn_implementation("eager")  # SDPA of some releases leaves the soft-cap out
    runner = specdec.ModelRunner(model, mode="compile")
    ids = torch.randint(3, runner.vocab_size, (1, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids).logits[0]
    runner.reserve([32])
    for _ in range(3):  # the second is recorded, the third replayed
        sequence = runner.cache.add()
        runner.forward([sequence], ids[0, :12], [12])
        logits = runner.forward([sequence], ids[0, 12:], [5]).logits
        runner.cache.free(sequence)
        torch.testing.assert_close(logits, expected[12:], atol=1e-5, rtol=1e-5)
