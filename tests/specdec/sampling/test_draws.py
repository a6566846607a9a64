from bisect import bisect_right
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from attention.dispatch import triton_available
from specdec.sampling import draws as sampling
from specdec.sampling.draws import best, draw, highest, peak, residual, sample, sample_distinct, top, totals_of
from specdec.sampling.processors import PREFIX_FREE, Processors
from tests.attention.devices import DEVICE

LAST = 1 - 2**-53  # the largest number that noise can yield
UNIFORMS = st.one_of(st.sampled_from([0.0, 2**-53, 0.5, LAST]), st.floats(0, LAST))
WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=12).filter(any)
INF = float("inf")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(WEIGHTS, UNIFORMS)
def test_draw_inverts_the_cumulative_sum_and_never_takes_a_zero_weight(weights, uniform):
    cumulative = list(accumulate(weights))
    index = draw(torch.tensor(weights, dtype=torch.float64), torch.tensor(uniform, dtype=torch.float64))
    assert index.item() == bisect_right(cumulative, uniform * cumulative[-1])
    assert weights[index] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, LAST])
def test_zeros_at_both_ends_are_never_drawn_from_a_large_vocabulary(dtype, uniform):
    weights = torch.rand(64, 50_000, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.01
    weights[:, :100], weights[:, -100:] = 0, 0
    weights[:, ::3] = 0
    index = draw(weights, torch.full((64,), uniform, dtype=torch.float64))
    alive = weights > 0
    edge = alive.long().argmax(-1) if uniform == 0 else weights.shape[1] - 1 - alive.flip(-1).long().argmax(-1)
    assert torch.equal(index, edge)


def test_draw_hits_each_cell_of_the_unit_interval_exactly():
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    just_below = [
        torch.nextafter(torch.tensor(x, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).item()
        for x in (0.25, 0.75)
    ]
    uniforms = torch.tensor([0.0, just_below[0], 0.25, just_below[1], 0.75, LAST], dtype=torch.float64)
    assert draw(weights.expand(6, 6), uniforms).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw(weights.expand(6, 6) * 1000, uniforms).tolist() == [1, 1, 3, 3, 4, 4]  # weights need not sum to one


def test_float32_weights_are_summed_in_float64():
    generator = torch.Generator().manual_seed(4)
    weights = torch.cat(
        [torch.tensor([1e6]), torch.rand(2000, generator=generator)]
    )  # float32 would round the small ones to sixteenths
    uniforms = 1 - 1e-3 * torch.rand(500, dtype=torch.float64, generator=generator)
    cumulative = weights.double().numpy().cumsum()
    expected = np.searchsorted(cumulative, uniforms.numpy() * cumulative[-1], side="right")
    assert draw(weights.expand(500, -1), uniforms).tolist() == expected.tolist()


def test_draw_keeps_leading_dimensions():
    weights = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = [[draw(weights[i, j], uniforms[i, j]).item() for j in range(3)] for i in range(2)]
    assert draw(weights, uniforms).tolist() == expected


@pytest.mark.parametrize("poison", [float("nan"), INF])
@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
def test_weights_that_are_not_finite_give_an_index_inside_the_vocabulary(poison, uniform):
    for place in range(5):
        weights = torch.ones(5)
        weights[place] = poison
        assert 0 <= draw(weights, torch.tensor(uniform, dtype=torch.float64)) < 5
    assert 0 <= draw(torch.full((5,), poison), torch.tensor(uniform, dtype=torch.float64)) < 5


@pytest.mark.parametrize("count", [1, 2, 5, 18])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_draws_without_replacement_are_draws_from_what_is_left(dtype, count):
    """Against plain Python; two rows of scores run out of tokens."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(2, 3, 20, generator=generator, dtype=torch.float64).to(dtype)
    scores[0, 1, 1:], scores[1, 2, 3:] = -INF, -INF
    uniform = torch.rand(2, 3, count, generator=generator, dtype=torch.float64)
    probs = torch.zeros(2, 3, 20, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, left = sample_distinct(scores, uniform, probs=probs)
    assert tokens.shape == left.shape == uniform.shape and left.dtype == torch.bool
    weights = scores.softmax(-1, dtype=probs.dtype)
    assert probs.equal(weights) and tokens.equal(sample_distinct(scores, uniform)[0])
    for row in range(2):
        for node in range(3):
            rest = weights[row, node].tolist()
            for rank, number in enumerate(uniform[row, node].tolist()):
                total, below = sum(rest), list(accumulate(rest))
                assert left[row, node, rank] == (total > 0)
                if total > 0:
                    token = int(tokens[row, node, rank])
                    near = 1e-9 * total
                    assert rest[token] > 0 and below[token] > number * total - near
                    assert below[token] - rest[token] <= number * total + near
                    rest[token] = 0.0
    assert sample(scores, uniform[..., 0]).equal(tokens[..., 0])


def test_the_sum_and_the_smallest_of_weights():
    weights = torch.tensor([[[0.5, 0.25, 0.25], [0.5, -0.25, 0.5]], [[1.0, 2.0, 3.0], [float("nan"), 1.0, 0.0]]])
    totals, least = totals_of(weights)
    assert totals.dtype == torch.float64 and totals[:, 0].tolist() == [1.0, 6.0] and totals[0, 1] == 0.75
    assert totals[1, 1].isnan() and least[:, 0].tolist() == [0.0, 0.0] and least[0, 1] == -0.25
    exact = totals_of(torch.tensor([[1.0, *[2.0**-25] * 4]]))[0]
    assert exact.tolist() == [1 + 2.0**-23]  # in float32 it would be 1


@pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
def test_a_named_kernel_finds_the_largest_or_says_what_it_cannot_do():
    scores = torch.randn(2, 20, device=DEVICE)
    assert top(scores, 16, "triton")[1].equal(top(scores, 16, "reference")[1])
    assert best(scores, "triton").equal(scores.argmax(-1)) and highest(scores, "triton").equal(scores.amax(-1))
    assert all(ours.equal(theirs) for ours, theirs in zip(peak(scores, "triton"), scores.max(-1), strict=True))
    rows = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    uniform = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    probs = torch.zeros(2, 3, 20, device=DEVICE)
    tokens, left = sample_distinct(rows, uniform, "triton", probs)
    torch.testing.assert_close(probs, rows.softmax(-1))
    assert tokens.equal(sample_distinct(rows, uniform)[0]) and left.dtype == torch.bool and left.all()
    assert sample_distinct(rows, uniform, "triton")[0].equal(tokens)
    probs[0, 1, 2] = -0.25
    assert totals_of(probs, "triton")[1].tolist() == [[0.0, -0.25, 0.0], [0.0, 0.0, 0.0]]
    for call, said in (
        (lambda: top(scores, 17, "triton"), "it finds up to 16, got 17"),
        (lambda: top(scores, 18, "triton"), "it finds up to 16, got 18"),
        (lambda: best(scores.double(), "triton"), "it compares in float32"),
        (lambda: totals_of(scores.double(), "triton"), "it takes float32 weights, got torch.float64"),
        (lambda: totals_of(scores.half(), "triton"), "it takes float32 weights, got torch.float16"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# the largest scores: the first of equal ones first, NaN before all

TOPS = {"looked at on a CPU": sampling._top_on_host, "by keys that differ": sampling._top_by_keys}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def in_plain_python(row, count):
    """Places of the `count` largest of a list: NaN first, then by value, equal ones in order."""
    return sorted(range(len(row)), key=lambda i: (row[i] == row[i], -row[i] if row[i] == row[i] else 0.0, i))[:count]


@pytest.mark.parametrize("found", TOPS.values(), ids=TOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("row", "places"),
    [
        ([0, 3, 1, 3, 3, 2], [1, 3]),
        ([5, 5, 5, 5], [0, 1, 2, 3]),
        ([5, 5, 5, 5], [0, 1]),
        ([-INF, -INF, 1, -INF], [2, 0, 1]),
        ([-INF] * 3, [0, 1, 2]),
        ([1, float("nan"), INF, float("nan"), 2], [1, 3, 2, 4]),
        ([float("nan")] * 3, [0, 1]),
        ([0.0, -0.0, 0.0], [0, 1, 2]),
        ([-0.0, 0.0], [0]),
        ([7], [0]),
    ],
)
def test_equal_scores_come_in_the_order_of_their_places(row, places, dtype, found):
    scores = torch.tensor(row, dtype=dtype)
    for rows in (scores, scores[None], scores.expand(2, 3, -1), torch.stack([scores, scores], 1).T):
        values, indices = found(rows, len(places))
        assert (
            indices.dtype == torch.int64
            and values.dtype == dtype
            and values.shape == indices.shape == (*rows.shape[:-1], len(places))
        )
        assert torch.equal(indices, torch.tensor(places).expand_as(indices))
        torch.testing.assert_close(values, rows.gather(-1, indices), rtol=0, atol=0, equal_nan=True)
    assert (
        top(scores, len(places))[1].tolist() == places
        and best(scores[None]).item() == peak(scores[None])[1].item() == places[0]
    )


@pytest.mark.parametrize("found", TOPS.values(), ids=TOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [-1.0, 1.0, -(2.0**-10), 2.0**10])
def test_neighbouring_numbers_are_told_apart(value, dtype, found):
    lower = lambda x: torch.nextafter(x, torch.tensor(-INF, dtype=dtype))
    high = torch.tensor(value, dtype=dtype)
    middle, low = lower(high), lower(lower(high))
    scores = torch.stack([low, middle, high, high, low, middle, middle, high, low]).view(3, 3)
    values, places = found(scores, 3)
    assert values.tolist() == [[high.item(), middle.item(), low.item()]] * 3 and places.tolist() == [
        [2, 1, 0],
        [0, 2, 1],
        [1, 0, 2],
    ]


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
def test_the_best_score_and_its_place_are_found_behind_any_dimensions(shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = scores.reshape(-1, shape[-1]).tolist()
    values, places = (
        torch.tensor([max(row) for row in rows]).view(shape[:-1]),
        torch.tensor([row.index(max(row)) for row in rows]).view(shape[:-1]),
    )
    assert torch.equal(highest(scores), values) and torch.equal(best(scores), places)
    assert torch.equal(peak(scores)[0], values) and torch.equal(peak(scores)[1], places)


@pytest.mark.parametrize("found", TOPS.values(), ids=TOPS)
def test_tiny_numbers_are_told_apart(found):
    scores = torch.tensor([[2.0**-100, 2.0**-99, -(2.0**-100), 0.0]])
    assert found(scores, 4)[1].tolist() == [[1, 0, 3, 2]]


SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, INF, -INF, float("nan"), 1e-45, -1e-45]),
    st.integers(-3, 3).map(float),
    st.floats(width=16),
)


@pytest.mark.parametrize("found", TOPS.values(), ids=TOPS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=1, max_size=4)),
    st.data(),
)
def test_the_largest_are_those_of_a_sort_in_plain_python(found, rows, data):
    dtype, count = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, len(rows[0])))
    scores = torch.tensor(rows, dtype=dtype)
    assert found(scores, count)[1].tolist() == [in_plain_python(row, count) for row in scores.tolist()]
    assert top(scores, count)[1].tolist() == [in_plain_python(row, count) for row in scores.tolist()]


@pytest.mark.parametrize("found", TOPS.values(), ids=TOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tied_scores_of_a_vocabulary_come_in_order(dtype, found):
    scores = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[3] = scores[3].round()
    expected = scores.sort(descending=True, stable=True)
    assert dtype.itemsize > 2 or bool((expected.values[:, :9] == expected.values[:, 1:10]).any()), "16 bits tie"
    for count in (1, 4, 17):
        values, places = found(scores, count)
        assert torch.equal(places, expected.indices[:, :count]) and torch.equal(values, expected.values[:, :count])


def test_what_is_left_of_p_is_a_distribution_and_p_where_nothing_is():
    p, q = (
        torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]),
        torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.5, 0.5, 0.0]]),
    )
    left = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(residual(p, q), left, rtol=0, atol=0)
    for shape in ((3, 1, 3), (1, 3, 3)):  # whatever is in front
        torch.testing.assert_close(residual(p.view(shape), q.view(shape)), left.view(shape), rtol=0, atol=0)


def logits(positions=6, vocabulary=20, dtype=torch.float32):
    return (3 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(3))).to(dtype)


WARPERS = {
    "none": list,
    "temperature": lambda: [TemperatureLogitsWarper(0.7)],
    "top-k": lambda: [TopKLogitsWarper(5)],
    "top-p": lambda: [TopPLogitsWarper(0.8)],
    "all": lambda: [TemperatureLogitsWarper(0.7), TopKLogitsWarper(8), TopPLogitsWarper(0.8)],
}


@pytest.mark.parametrize("name", WARPERS)
def test_warpers_equal_those_of_transformers_all_positions_at_once_or_one_by_one(name):
    given, rows = logits(), [0, 0, 1, 1, 1, 2]
    before = given.clone()
    processors = Processors([WARPERS[name]() for _ in range(3)])
    assert not processors.need_prefix
    scores = processors(given, rows)
    assert torch.equal(scores, LogitsProcessorList(WARPERS[name]())(None, given))
    assert torch.equal(scores, torch.cat([processors(given[m : m + 1], [rows[m]]) for m in range(6)]))
    assert torch.equal(given, before)


def test_a_processor_that_is_not_known_to_ignore_the_prefix_gets_it():
    seen = []

    def spy(prefix, scores):
        seen.append(prefix.tolist())
        return scores.add_(1)  # in place, as a user's processor may

    given = logits(3)
    before = given.clone()
    processors = Processors([[spy, TemperatureLogitsWarper(0.7)]] * 2)
    assert processors.need_prefix
    scores = processors(given, [0, 1, 1], lambda m: torch.tensor([[9, m]]))
    assert seen == [[[9, 0]], [[9, 1]], [[9, 2]]]
    assert torch.equal(given, before)
    assert torch.equal(scores, TemperatureLogitsWarper(0.7)(None, given + 1))


def test_every_position_of_a_tree_is_penalised_for_its_own_prefix_in_its_own_row():
    prefixes = [[1], [1, 2], [1, 3], [1, 2, 2], [4, 0], [4, 0, 2]]  # four nodes of row 0, two of row 1
    given, rows = logits(6, 6), [0, 0, 0, 0, 1, 1]
    before = given.clone()
    penalties = {0: 2.0, 1: 5.0}
    lists = [
        [RepetitionPenaltyLogitsProcessor(penalties[r]), NoBadWordsLogitsProcessor([[5], [2, 3]], eos_token_id=[0])]
        for r in (0, 1)
    ]
    expected = given.clone()
    for m, prefix in enumerate(prefixes):
        for token in set(prefix):
            penalty = penalties[rows[m]]
            expected[m, token] = (
                expected[m, token] * penalty if expected[m, token] < 0 else expected[m, token] / penalty
            )
        expected[m, 5] = -INF
        if prefix[-1] == 2:
            expected[m, 3] = -INF
    scores = Processors(lists)(given, rows, lambda m: torch.tensor([prefixes[m]]))
    torch.testing.assert_close(scores, expected)
    assert (scores[:, 3] == -INF).tolist() == [False, True, False, True, False, True]
    assert torch.equal(given, before)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_bf16_logits_are_processed_in_float32(with_prefix):
    given = logits(dtype=torch.bfloat16)
    chain = WARPERS["all"]() + [RepetitionPenaltyLogitsProcessor(1.3)] * with_prefix
    scores = Processors([chain])(given, [0] * 6, lambda m: torch.tensor([[m, 0]]))
    prefixes = torch.tensor([[m, 0] for m in range(6)])
    assert scores.dtype == torch.float32
    assert torch.equal(scores, LogitsProcessorList(chain)(prefixes, given.float()))


def test_fp64_logits_stay_fp64():
    given = logits(dtype=torch.float64)
    assert torch.equal(Processors([[TemperatureLogitsWarper(0.7)]])(given, [0] * 6), given / 0.7)


def named(name: str, **held):
    """A processor of a class called `name` that holds `held` and changes nothing."""
    made = type(name, (), {"__call__": lambda self, ids, scores: scores})()
    vars(made).update(held)
    return made


def test_processors_know_whether_they_change_scores_and_look_at_the_text():
    temperature, penalty = named("TemperatureLogitsWarper"), named("RepetitionPenaltyLogitsProcessor")
    assert not Processors([[]]).change_scores and not Processors([[], []]).change_scores
    assert Processors([[temperature]]).change_scores and Processors([[], [temperature]]).change_scores
    assert not Processors([[temperature]]).need_prefix and Processors([[temperature, penalty]]).need_prefix
    assert not Processors([[named(name) for name in PREFIX_FREE]]).need_prefix
    assert Processors([[penalty, temperature]]).need_host == ["RepetitionPenaltyLogitsProcessor"]


@pytest.mark.parametrize(("answer", "said"), [(None, "None"), (torch.zeros(1, 3), r"\[1, 3\]"), ([0.0], r"\[0.0\]")])
def test_a_processor_that_returns_something_else_is_named(answer, said):
    class Odd:
        def __call__(self, ids, scores):
            return answer

    with pytest.raises(
        ValueError,
        match=rf"the logits processor Odd must return scores of the shape it was given, \[1, 5\], got {said}",
    ):
        Processors([[Odd()]])(torch.zeros(1, 5), [0], lambda m: torch.tensor([[1]]))
