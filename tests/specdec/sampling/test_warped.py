"""Samples and warpers by kernels that write no scores, against PyTorch: on a GPU or in Triton's interpreter."""

import pytest
import torch
from transformers.generation import logits_process as hf

from attention.dispatch import triton_available
from specdec.sampling.draws import sample, sample_distinct, totals_of
from specdec.sampling.warped import Warped, warp_lazily
from specdec.sampling.warpers import Warper, warp
from tests.attention.devices import DEVICE

pytestmark = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")


def softmax(scores):
    """`[M, V]`: what the kernel writes."""
    rows = scores.shape[:-1].numel()
    probs = torch.empty(1, rows, scores.shape[-1], device=scores.device)
    sample_distinct(scores, torch.zeros(rows, 1, dtype=torch.float64, device=scores.device), "triton", probs)
    return probs[0]


def boundaries(scores, uniform):
    """How far, in shares of the whole, each of `uniform` lies from the nearest boundary between two tokens."""
    cumulative = scores.double().softmax(-1).cumsum(-1)
    return (cumulative - uniform[..., None]).abs().amin(-1)


@pytest.mark.parametrize(
    "size, dtype", [(1, torch.float32), (7, torch.bfloat16), (4097, torch.float32), (9000, torch.bfloat16)]
)
def test_a_sample_is_the_reference_s_but_at_boundaries(size, dtype):
    """Of peaked and flat rows, rows with forbidden tokens, and rows that do not lie in one piece."""
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(6, 4, size, generator=generator) * torch.tensor([0.0, 1.0, 8.0, 60.0])[:, None]
    scores[1, :, ::2] = scores[2, :, : size // 2] = float("-inf") if size > 1 else 0.0
    scores, uniform = scores.to(DEVICE, dtype), torch.rand(6, 4, generator=generator, dtype=torch.float64).to(DEVICE)
    uniform[3, 0], uniform[3, 1] = 0.0, 1 - 2.0**-53
    for rows, numbers in ((scores, uniform), (scores.transpose(0, 1), uniform.t()), (scores[:, ::2], uniform[:, ::2])):
        ours, theirs = (sample(rows, numbers, impl) for impl in ("triton", "reference"))
        assert ours.shape == numbers.shape
        near = boundaries(rows.float(), numbers) < 1e-6
        assert bool(((ours == theirs) | near).all())
        assert bool((rows.gather(-1, ours[..., None]) > float("-inf")).all())


def test_samples_of_rows_that_are_not_finite_stay_inside_the_vocabulary():
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[0, 4000], scores[1, 10], scores[2] = float("nan"), float("inf"), float("-inf")
    tokens = sample(scores, torch.full((3,), 0.5, dtype=torch.float64, device=DEVICE), "triton")
    assert bool(((tokens >= 0) & (tokens < 5000)).all())


@pytest.mark.parametrize("size, count", [(3, 16), (4096, 5), (9000, 1), (9000, 2)])
def test_draws_without_replacement_are_the_reference_s_but_at_boundaries(size, count):
    """Down to tails that vanish beside the first token, and rows that run out of tokens."""
    generator = torch.Generator().manual_seed(size + count)
    scores = torch.randn(8, size, generator=generator) * torch.tensor([1.0, 4.0])[:, None, None].expand(
        2, 4, 1
    ).reshape(8, 1)
    scores[0, 1] = scores[5, 0] = 70.0  # all others together weigh less than 1e-27
    scores[2, 2:] = float("-inf")
    uniform = torch.rand(8, count, generator=generator, dtype=torch.float64).to(DEVICE)
    scores = scores.to(DEVICE)
    probs, expected = torch.empty(2, 8, 3, size, device=DEVICE)[:, :, 1:2].unbind(0)  # rows that lie apart
    (ours, left), (theirs, some) = (
        (x[:, 0] for x in sample_distinct(scores[:, None], uniform[:, None], impl, into))
        for impl, into in (("triton", probs), ("reference", expected))
    )
    assert left.equal(some)
    torch.testing.assert_close(probs, expected, atol=1e-7, rtol=2e-6)
    going, rest = torch.ones(8, dtype=torch.bool, device=DEVICE), scores.double().softmax(-1)
    for rank in range(count):
        cumulative = rest.cumsum(-1) / rest.sum(-1, keepdim=True)
        near = (cumulative - uniform[:, rank, None]).abs().amin(-1) < 1e-6
        same = (ours[:, rank] == theirs[:, rank]) | ~left[:, rank] | near
        assert bool((same | ~going).all())
        going &= (ours[:, rank] == theirs[:, rank]) & left[:, rank]
        rest = rest.scatter(1, theirs[:, rank, None], 0.0)
    distinct = [
        len(set(row[: int(kept.sum())])) == int(kept.sum()) for row, kept in zip(ours.tolist(), left, strict=True)
    ]
    assert all(distinct)


def rows_of(size, dtype):
    """Flat and peaked rows, ties, forbidden tokens, a row of equal scores, one around zero."""
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(9, size, generator=generator) * torch.tensor([0.1, 1, 8, 60, 1, 1, 1, 3, 0.01])[:, None]
    scores[4] = scores[4].round(decimals=1)
    scores[5] = 2.0
    scores[6, : size // 2] = float("-inf")
    scores[7] += 9.0
    return scores.to(DEVICE, dtype)


def warped_and_written(warpers, numbers, logits):
    """The softmax of `logits [M, V]` after `warpers`, by the kernels and by PyTorch."""
    rows = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None].expand(-1, len(logits))
    lazy = warp_lazily(warpers, rows, logits, "triton")
    assert lazy is not None
    return softmax(lazy), warp(warpers, rows, logits.float()).softmax(-1)


TEMPERATURE = Warper(hf.TemperatureLogitsWarper)


@pytest.mark.parametrize("size, outside, dtype", [
    (3, 0.5, torch.float32), (300, 1e-6, torch.float16), (300, 0.999, torch.bfloat16), (4500, 0.1, torch.bfloat16),
])  # fmt: skip
def test_top_p_keeps_what_a_stable_sort_keeps(size, outside, dtype):
    """One token at the boundary may differ; of equal scores those of lower index go first."""
    logits, numbers = rows_of(size, dtype), [[0.7], [outside]]
    warpers = [TEMPERATURE, Warper(hf.TopPLogitsWarper)]
    ours, _ = warped_and_written(warpers, [0.7, outside], logits)
    scores = logits.float() / 0.7
    order = torch.argsort(scores.double(), stable=True)
    shares = scores.double().softmax(-1).gather(1, order).cumsum(1)
    removed = shares <= float(torch.tensor(outside))
    removed[:, -1] = False
    expected = scores.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), float("-inf")).softmax(-1)
    near = (shares - numbers[1][0]).abs() < 2e-6
    decided = ~torch.zeros_like(near).scatter(1, order, near)
    assert bool((((ours > 0) == (expected > 0)) | ~decided).all())
    few = ~near.any(1)
    torch.testing.assert_close(ours[few], expected[few], atol=1e-6, rtol=1e-5)
    assert int(few.sum()) >= 3


KINDS = [
    (hf.TopKLogitsWarper, 1), (hf.TopKLogitsWarper, 50), (hf.MinPLogitsWarper, 0.1), (hf.MinPLogitsWarper, 1.0),
    (hf.MinPLogitsWarper, 0.0), (hf.EpsilonLogitsWarper, 3e-4), (hf.EpsilonLogitsWarper, 0.5),
    (hf.EtaLogitsWarper, 2e-3), (hf.TypicalLogitsWarper, 0.3), (hf.TypicalLogitsWarper, 0.95),
]  # fmt: skip
LARGE = [(*one, 4500, torch.bfloat16) for one in KINDS if one[1] in (50, 3e-4, 0.95)]


@pytest.mark.covering(cases=8)
@pytest.mark.parametrize("kind, number, size, dtype", [*((*one, 60, torch.float16) for one in KINDS), *LARGE])
def test_other_warpers_keep_what_transformers_keep(kind, number, size, dtype):
    logits = rows_of(size, dtype)
    ours, theirs = warped_and_written([TEMPERATURE, Warper(kind, widest=64)], [0.7, number], logits)
    same = ((ours > 0) == (theirs > 0)).all(1)
    assert int(same.sum()) >= len(logits) - (kind in (hf.EpsilonLogitsWarper, hf.TypicalLogitsWarper))
    torch.testing.assert_close(ours[same], theirs[same], atol=2e-6, rtol=2e-5)


@pytest.mark.thorough
def test_warpers_after_one_another():
    """Each sees what the ones before have left, and rows have numbers of their own."""
    logits = (3 * torch.randn(6, 500, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    kinds = [hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper,
             hf.TypicalLogitsWarper, hf.EpsilonLogitsWarper, hf.EtaLogitsWarper, hf.LogitNormalization]  # fmt: skip
    numbers = torch.tensor([[0.7, 1.5, 1.0], [40, 200, 3], [0.1, 0.3, 0.01], [0.02, 0.001, 0.1], [0.9, 0.99, 0.6],
                            [1e-3, 1e-4, 1e-2], [2e-3, 1e-4, 1e-3]], dtype=torch.float64, device=DEVICE)  # fmt: skip
    warpers, numbers = [Warper(kind, widest=256) for kind in kinds], numbers.repeat(1, 2)
    lazy = warp_lazily(warpers, numbers, logits, "triton")
    assert lazy is not None
    ours, theirs = softmax(lazy), warp(warpers, numbers, logits).softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    assert (theirs > 0).sum(1).unique().numel() > 2


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 1e38, float("inf")])
def test_extreme_temperatures(temperature):
    """Scores overflow to -inf, or all become 0."""
    logits = torch.tensor([[1.0, 0.5, -5.0, -70.0], [0.0, -30.0, 0.0, -2.0]]).to(DEVICE)
    ours, theirs = warped_and_written([TEMPERATURE], [temperature], logits)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.thorough
def test_top_k_counts_tokens_that_typical_decoding_has_left():
    """It may remove the likeliest ones, so that k is not counted from the highest logit on."""
    logits = (0.9 * torch.randn(4, 300, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    logits[:, 5] = 2.2
    warpers = [Warper(hf.TypicalLogitsWarper), Warper(hf.TopKLogitsWarper, widest=8)]
    numbers = torch.tensor([[0.2], [5.0]], dtype=torch.float64, device=DEVICE).expand(-1, 4)
    assert warp_lazily(warpers, numbers, logits, "triton") is None
    assert warp_lazily(warpers[::-1], numbers.flip(0), logits, "triton") is not None


def test_what_kernels_cannot_do_is_written():
    logits = torch.randn(2, 50, device=DEVICE)
    number = torch.ones(1, 2, dtype=torch.float64, device=DEVICE)
    for warper in (Warper(hf.TopPLogitsWarper, keep=2), Warper(hf.MinPLogitsWarper, keep=3)):
        assert warp_lazily([warper], number, logits, "triton") is None
    with pytest.raises(ValueError, match="writes scores for TopKLogitsWarper"):
        warp_lazily([Warper(hf.TopKLogitsWarper, filter_value=-1.0)], number, logits, "triton")
    with pytest.raises(ValueError, match="float64"):
        warp_lazily([TEMPERATURE], number, logits.double(), "triton")
    assert warp_lazily([TEMPERATURE], number, logits, "reference") is None


@pytest.mark.parametrize("kind", [hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.TypicalLogitsWarper])
def test_broken_rows_are_left_to_whoever_looks_for_them(kind):
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 7], logits[1, 9], logits[2] = float("nan"), float("inf"), float("-inf")
    lazy = warp_lazily([Warper(kind)], torch.full((1, 3), 0.5, dtype=torch.float64, device=DEVICE), logits, "triton")
    assert lazy is not None
    tokens = sample(lazy, torch.full((3,), 0.5, dtype=torch.float64, device=DEVICE))
    assert bool(((tokens >= 0) & (tokens < 3000)).all())


def test_samples_of_what_warpers_leave():
    """Drawn where PyTorch draws, from scores of another shape too."""
    logits = rows_of(4500, torch.bfloat16).view(3, 3, -1)
    numbers = torch.tensor([[0.7], [0.2]], dtype=torch.float64, device=DEVICE).expand(-1, 9)
    warpers = [TEMPERATURE, Warper(hf.TopPLogitsWarper)]
    lazy = warp_lazily(warpers, numbers, logits, "triton")
    assert isinstance(lazy, Warped) and lazy.shape == logits.shape
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        uniform = torch.rand(3, 3, generator=generator, dtype=torch.float64).to(DEVICE)
        probs = softmax(lazy)
        cumulative = probs.double().cumsum(-1).view(3, 3, -1)
        expected = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0]
        near = (cumulative - uniform[..., None]).abs().amin(-1) < 1e-6
        assert bool(((sample(lazy, uniform) == expected) | near).all())


def test_totals_of_distributions():
    weights = torch.rand(2, 3, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights[0, 1, 4999], weights[1, 2, 7] = -0.5, float("nan")
    (totals, least), (sums, lowest) = (totals_of(weights, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(totals, sums, atol=1e-9, rtol=1e-12, equal_nan=True)
    fine = ~totals.isnan()
    assert least[fine].equal(lowest[fine]) and float(least[0, 1]) == -0.5 and int(fine.sum()) == 5
