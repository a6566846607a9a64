"""Warpers with a number per row give transformers' scores, bit for bit, whatever the other rows' numbers are."""

import pytest
import torch
from transformers.generation import logits_process as hf

from specdec.sampling.processors import Processors
from specdec.sampling.warpers import Warper, largest_after, split, warp

MAKES = {
    "temperature": lambda x: hf.TemperatureLogitsWarper(0.3 + x),
    "top-k": lambda x: hf.TopKLogitsWarper(1 + int(9 * x)),
    "top-k of at least 4": lambda x: hf.TopKLogitsWarper(1 + int(9 * x), min_tokens_to_keep=4),
    "top-k of more than there are": lambda x: hf.TopKLogitsWarper(30 + int(9 * x)),
    "top-p": lambda x: hf.TopPLogitsWarper(0.05 + 0.9 * x),
    "top-p of at least 3": lambda x: hf.TopPLogitsWarper(0.05 + 0.9 * x, min_tokens_to_keep=3),
    "min-p": lambda x: hf.MinPLogitsWarper(0.5 * x, min_tokens_to_keep=2),
    "typical": lambda x: hf.TypicalLogitsWarper(0.05 + 0.9 * x, min_tokens_to_keep=2),
    "epsilon": lambda x: hf.EpsilonLogitsWarper(0.01 + 0.2 * x),
    "epsilon with a filter value": lambda x: hf.EpsilonLogitsWarper(0.01 + 0.2 * x, filter_value=-1e4),
    "epsilon of at least 3": lambda x: hf.EpsilonLogitsWarper(0.01 + 0.9 * x, min_tokens_to_keep=3),
    "epsilon of more than there are": lambda x: hf.EpsilonLogitsWarper(0.01 + 0.9 * x, min_tokens_to_keep=30),
    "eta": lambda x: hf.EtaLogitsWarper(0.001 + 0.6 * x),
    "eta of at least 3": lambda x: hf.EtaLogitsWarper(0.01 + 0.9 * x, min_tokens_to_keep=3),
    "min-p of more than there are": lambda x: hf.MinPLogitsWarper(0.5 * x, min_tokens_to_keep=30),
    "typical of all": lambda x: hf.TypicalLogitsWarper(1 - 1e-12 * (1 - x / 2)),
    "finite": lambda x: hf.InfNanRemoveLogitsProcessor(),
    "normalised": lambda x: hf.LogitNormalization(),
}


@pytest.mark.parametrize("forbidden", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MAKES)
def test_scores_are_those_of_transformers(name, dtype, forbidden):
    generator = torch.Generator().manual_seed(0)
    numbers = [i / 6 for i in range(6)]
    lists = [[MAKES["temperature"](1 - x), MAKES[name](x)] for x in numbers]
    processors = Processors(lists)
    logits = (3 * torch.randn(12, 23, generator=generator, dtype=dtype)).round(decimals=1)  # with ties
    if forbidden:
        logits[:, 5] = float("-inf")
    rows = [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    scores = processors(logits, rows)
    expected = torch.cat([lists[row][1](None, lists[row][0](None, logits[i : i + 1])) for i, row in enumerate(rows)])
    assert processors.warpers is not None and scores.dtype == dtype
    assert scores.equal(expected) and not scores.equal(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_that_are_not_finite_become_those_of_transformers(dtype):
    logits = torch.tensor([[1.0, float("nan"), float("inf"), float("-inf"), 0.0]], dtype=dtype)
    finite = hf.InfNanRemoveLogitsProcessor()
    assert Processors([[finite]])(logits, [0]).equal(finite(None, logits))


def test_requests_with_the_same_kinds_share_a_captured_round():
    kinds = lambda *lists: Processors(lists).warpers
    hot, cold = ([hf.TemperatureLogitsWarper(t), hf.TopPLogitsWarper(0.9)] for t in (1.5, 0.5))
    assert kinds(hot) == kinds(cold) == kinds(hot, cold)
    assert kinds(hot) != kinds(hot[:1]) and kinds(hot) != kinds(hot[::-1])
    assert kinds([hf.TopPLogitsWarper(0.9, min_tokens_to_keep=2)]) != kinds([hf.TopPLogitsWarper(0.9)])
    assert (
        kinds([hf.TopKLogitsWarper(5)]) == kinds([hf.TopKLogitsWarper(8)]) == (Warper(hf.TopKLogitsWarper, widest=8),)
    )
    assert kinds([hf.TopKLogitsWarper(5)]) != kinds([hf.TopKLogitsWarper(9)])
    assert kinds(hot[:1]) == (Warper(hf.TemperatureLogitsWarper),)


def test_slots_without_a_row_may_hold_any_number():
    """Those of an earlier call with other warpers, or with a larger k than there is now."""
    scores, numbers = torch.arange(40.0).repeat(4, 1), torch.tensor([[3.0, 0.0, 0.7, 30.0]], dtype=torch.float64)
    kept = warp([Warper(hf.TopKLogitsWarper, widest=4)], numbers, scores)
    assert int(kept[0].isfinite().sum()) == 3


def test_what_is_no_number_a_row_is_left_to_transformers():
    class Mine(hf.TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            return -scores

    assert split([[Mine(0.5)]]) is None and split([[hf.TopHLogitsWarper(0.5)]]) is None
    assert split([[hf.TemperatureLogitsWarper(0.5)], []]) is None
    assert split([[hf.TopPLogitsWarper(0.5)], [hf.TopPLogitsWarper(0.5, min_tokens_to_keep=2)]]) is None
    mine = Processors([[Mine(0.5)]])
    assert mine.warpers is None and mine.need_host == ["Mine"]


@pytest.mark.parametrize("name", MAKES)
def test_the_largest_score_is_known_without_looking_where_processors_keep_it(name):
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    scores[2] *= 1e30
    lists = [[hf.TemperatureLogitsWarper(1e-12 if i == 2 else 0.7), MAKES[name](i / 6)] for i in range(6)]
    warpers, numbers = split(lists)
    numbers = torch.tensor(numbers, dtype=torch.float64)
    known = largest_after(warpers, numbers, scores.amax(-1))
    assert (known is None) == (name in ("typical", "typical of all", "finite", "normalised"))
    if known is not None:
        assert known.equal(warp(warpers, numbers, scores).amax(-1)) and known[2].isinf()
