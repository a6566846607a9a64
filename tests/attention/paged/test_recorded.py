"""The kernel in C that recordings attend with, against the oracle of the reference, and its writes."""

from dataclasses import replace

import pytest
import torch

from attention.native.library import why_unavailable
from attention.paged.recorded import record_layer
from attention.recording import Recording, current
from tests.attention.paged.test_reference import WHOLE_BATCHES, cases
from tests.attention.problems import (
    BRANCHING,
    LATENTS,
    LAYER,
    SEVENTY,
    SINKS,
    WINDOWS,
    Case,
    Problem,
    give_back_fronts,
    make,
    oracle,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no kernels in C: {why_unavailable()}")


def recorded(problem: Problem, batch=None) -> Recording:
    """A layer of the problem, whose new keys and values are those that the cache has already."""
    case, cache = problem.case, problem.cache
    batch = batch or problem.batch()
    key, value = (slots[LAYER][batch.slots].clone() for slots in (cache.key_slots, cache.value_slots))
    settings = problem.scale, case.window, case.softcap, problem.sinks
    return Recording(lambda: record_layer(current(), batch, LAYER, problem.query, key, value, *settings), native=True)


def attend(problem: Problem) -> torch.Tensor:
    recording = recorded(problem)
    assert len(recording) == 1
    with torch.inference_mode():
        recording.result.fill_(float("nan"))
    recording.replay()
    return recording.result


@pytest.mark.parametrize("case", [*cases(), *LATENTS])
def test_equals_the_oracle(case):
    problem = make(case)
    torch.testing.assert_close(attend(problem).double(), oracle(problem), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [*WHOLE_BATCHES, Case(rows=((339, 1), (1, 63)), last=5, parents=SEVENTY)])
def test_its_error_is_at_most_twice_the_reference_s(case):
    problem = make(case)
    expected = oracle(problem)
    error, of_reference = (float((x.double() - expected).abs().max()) for x in (attend(problem), problem.attend()))
    assert error <= 2 * of_reference + 1e-7


@pytest.mark.parametrize("case", WHOLE_BATCHES)
def test_neither_the_order_of_pages_nor_foreign_memory_changes_a_bit(case):
    expected = attend(make(case, shuffle=None))
    for other in (make(case, shuffle=2), make(case, poison=0.0), make(case, poison=float("inf"))):
        assert torch.equal(attend(other), expected)


@pytest.mark.parametrize("case", SINKS)
def test_no_window_hides_the_first_tokens_of_a_cache_that_says_so(case):
    problem = make(replace(case, kv_dtype=None))
    torch.testing.assert_close(attend(problem).double(), oracle(problem), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [*WINDOWS[:4], *SINKS[:3]])
def test_pages_before_the_window_may_be_given_back(case):
    problem = make(case)
    expected = attend(problem)
    give_back_fronts(problem)
    assert torch.equal(attend(problem), expected)


@pytest.mark.parametrize("case", [replace(case, page_size=page) for case in WHOLE_BATCHES for page in (16, 64)])
def test_a_token_s_result_depends_on_no_other_query(case):
    """Bit for bit: a row alone equals the row in a batch, and the last token alone equals it among others."""
    together = attend(make(case)).split(case.query_lengths)
    for row, ours in enumerate(together):
        assert torch.equal(ours, attend(make(case, rows=[row])))
    whole = make(case)
    fewer = replace(whole, case=replace(whole.case, last=1))
    ends = torch.tensor(case.query_lengths).cumsum(0) - 1
    fewer.query = whole.query[ends].contiguous()
    assert torch.equal(attend(fewer), torch.cat([ours[-1:] for ours in together]))


def test_threads_change_no_bit():
    problem, before = make(Case(rows=((113, 1), (17, 17), (63, 1)), heads=(16, 2))), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attend(problem).clone())
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("native", [True, False])
def test_a_layer_that_shares_keys_and_values_writes_none(native):
    problem = make(LATENTS[1])
    batch, expected = problem.batch(), oracle(problem)
    key, value = (torch.full_like(slots[LAYER][batch.slots], 9.0) for slots in (problem.cache.key_slots,) * 2)
    value = value[..., : problem.case.dims[1]]
    settings = problem.scale, problem.case.window, problem.case.softcap, problem.sinks
    run = lambda: record_layer(current(), batch, LAYER, problem.query, key, value, *settings, store_new=False)
    recording = Recording(run, native=native)
    recording.replay()
    torch.testing.assert_close(recording.result.double(), expected, atol=1e-5, rtol=0)


def test_writes_new_keys_and_values_and_skips_padding():
    problem = make(Case(rows=((17, 3),), parents=BRANCHING), poison=0.0)
    batch, slots = problem.batch(), [x[LAYER] for x in (problem.cache.key_slots, problem.cache.value_slots)]
    before = [x.clone() for x in slots]
    recording = recorded(problem, batch)
    for x in slots:
        x[batch.slots] = 7.0
    skipped = int(batch.slots[1])
    batch.slots[1] = -1
    recording.replay()
    for x, old in zip(slots, before, strict=True):
        old[skipped] = 7.0
        assert x.equal(old)


def test_reads_lengths_and_slots_in_every_replay():
    problem, shorter = make(Case(rows=((63, 1),))), make(Case(rows=((43, 1),)))
    slots = [problem.cache.slots(problem.sequences[0], range(44)), shorter.cache.slots(shorter.sequences[0], range(44))]
    batch = problem.batch()
    recording = recorded(problem, batch)
    for name in ("key_slots", "value_slots"):
        getattr(problem.cache, name)[LAYER][slots[0]] = getattr(shorter.cache, name)[LAYER][slots[1]]
    new = [getattr(shorter.cache, name)[LAYER][slots[1][-1:]] for name in ("key_slots", "value_slots")]
    batch.kv_lengths.sub_(20)
    batch.positions.sub_(20)
    batch.slots.fill_(slots[0][-1])
    problem.query.copy_(shorter.query)
    recording.replay()
    written = [getattr(problem.cache, name)[LAYER][slots[0][-1:]] for name in ("key_slots", "value_slots")]
    assert not any(a.equal(b) for a, b in zip(written, new, strict=True)), "the longer problem's last token"
    for name, x in zip(("key_slots", "value_slots"), written, strict=True):
        getattr(shorter.cache, name)[LAYER][slots[1][-1:]] = x
    torch.testing.assert_close(recording.result.double(), oracle(shorter), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case, dtype",
    [(Case(kv_dtype="int8"), torch.float32), (Case(), torch.float64), (Case(), torch.bfloat16)],
    ids=["int8 pages", "fp64", "bf16"],
)
def test_other_numbers_are_attended_by_pytorch(case, dtype):
    problem = make(case, dtype)
    torch.testing.assert_close(attend_by_reference(problem), problem.attend(), atol=1e-6, rtol=1e-2)


def attend_by_reference(problem: Problem) -> torch.Tensor:
    batch, generator = problem.batch(), torch.Generator().manual_seed(0)
    (_, groups), (key_dim, value_dim) = problem.case.heads, problem.case.dims
    draw = lambda width: torch.randn(len(batch.slots), groups, width, generator=generator).to(problem.query.dtype)
    key, value = draw(key_dim), draw(value_dim)
    return Recording(
        lambda: record_layer(current(), batch, LAYER, problem.query, key, value, problem.scale, None, None, None),
        native=True,
    ).result  # which stores, and so the reference that follows sees the same keys
