"""Models with a sliding window in every layer: an engine gives pages back while a row runs, and texts stay the same."""

import random
from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import specdec
from specdec.cuda_graph import HostCopy
from specdec.drafters.base import runners_of
from specdec.engine import lane, memory
from specdec.rounds import captured
from tests.families import build, noisy_copy
from tests.matrix import DRAFTERS
from tests.specdec.engine.forced import at_random, force
from tests.specdec.engine.test_engine import KINDS, PAGE, require_empty, tokens_alone

WINDOW = 9  # of `families`' Mistral, 3 pages
NEW = 44
NAMES = ("none", "chain", "tree", "dynamic tree", "prompt lookup", "early exit", "Medusa heads", "translated")


@cache
def model_of(family="mistral"):
    return build(family)


def drafter_of(name, family="mistral"):
    drafter = None if name == "none" else DRAFTERS[name](model_of(family), noisy_copy(family))
    for runner in runners_of(drafter):
        runner.page_size = PAGE
    return drafter


def engine_of(name="none", pages=200, mode="eager", family="mistral", **options):
    runner = specdec.ModelRunner(model_of(family), page_size=PAGE, mode=mode)
    drafter = drafter_of(name, family)
    own = [] if name == "early exit" else list(runners_of(drafter))
    size = sum(one.page_format.bytes for one in (runner, *own))
    return specdec.Engine(runner, drafter, memory=pages * size, **{"max_tokens_per_step": 32, "tree": None} | options)


def prompts_of(count, length, seed=0):
    """Texts of about `length` tokens that begin alike."""
    draws = random.Random(seed)
    base = [draws.randrange(10, 90) for _ in range(length)]
    return [base[: draws.randrange(length // 2, length)] + [draws.randrange(10, 90), 10 + i] for i in range(count)]


def text_of(length):
    """A text that does not repeat soon."""
    return [10 + (i * i + i // 7) % 83 for i in range(length)]


@cache
def solo_generator(name, family="mistral"):
    return specdec.SpeculativeGenerator(model_of(family), drafter_of(name, family), mode="eager")


def solo(name, prompt, options, family="mistral"):
    """The new tokens of a request that runs alone in a generator, which gives no page back."""
    return tokens_alone(solo_generator(name, family), prompt, {"max_new_tokens": NEW} | options)


def run(engine, poison=False, flush=False):
    """Step to the end; with `poison` every page that nobody owns and no block names holds NaN after each step.

    Returns the most pages of the target's cache that were owned after a step."""
    most = 0
    while not engine.idle:
        engine.step()
        if flush:
            engine._prefixes.flush()
        for held in engine._memory.caches:
            held.table.check_integrity()
            if poison:
                held.key_pages[:, held.table._free] = held.value_pages[:, held.table._free] = float("nan")
        for index in engine._prefixes.indexes:
            index.check_integrity()
        most = max(most, engine.target.cache.stats().owned)
    return most


def submit_all(engine, prompts, kinds):
    settings = [{"seed": i, "max_new_tokens": NEW} | kinds[i % len(kinds)] for i in range(len(prompts))]
    handles = [engine.submit(prompt, **chosen) for prompt, chosen in zip(prompts, settings, strict=True)]
    return list(zip(handles, prompts, settings, strict=True))


def require_texts(name, given, family="mistral"):
    for handle, prompt, options in given:
        assert handle.error is None and handle.tokens == solo(name, prompt, options, family), options


def seem_full_at_times(engine, seed):
    """Steps in which no page seems free, so that all requests but one make room: windows leave room for all else."""
    draws, free = random.Random(seed), engine._memory.free
    engine._memory.free = lambda: [0 for _ in free()] if draws.random() < 0.1 else free()


def read_one_round_late(monkeypatch):
    """Keep a round in flight, as on a GPU; on a CPU it would find its outcome overwritten by the next one."""
    monkeypatch.setattr(lane, "rounds_in_flight", lambda rows: 2)
    monkeypatch.setattr(captured, "HostCopy", lambda outcome: HostCopy(outcome.clone()))


@pytest.fixture(params=["eager", "graph"])
def mode(request, monkeypatch):
    """How rounds run: on the host, or captured and read one round late."""
    if request.param == "graph":
        read_one_round_late(monkeypatch)
    return request.param


@pytest.mark.covering(cases=4)
@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_requests_alone(name, mode, monkeypatch):
    """Of all kinds together, with NaN in every page that was given back; blocks are kept in one of the modes, and
    forgotten in the other one, by turns."""
    flush = (NAMES.index(name) + (mode == "graph")) % 2 == 1
    monkeypatch.setenv("SPECDEC_CHECK_KV", "1")
    engine = engine_of(name, mode=mode)
    given = submit_all(engine, prompts_of(5, 40), KINDS[:6])
    run(engine, poison=True, flush=flush)
    require_texts(name, given)
    require_empty(engine)


def with_pages_taken_ahead(runner, sequence, row):
    return runner.cache.length(sequence)


def with_rounds_in_flight(runner, sequence, row):
    return min(runner.cache.length(sequence), row.reach)


@pytest.mark.parametrize("plant", [with_pages_taken_ahead, with_rounds_in_flight])
def test_a_length_that_counts_drafts_is_seen(plant, monkeypatch):
    read_one_round_late(monkeypatch)
    engine = engine_of("chain", mode="graph")
    given = submit_all(engine, prompts_of(4, 40), [{}])
    monkeypatch.setattr(memory, "settled", plant)
    run(engine, poison=True, flush=True)
    with pytest.raises(AssertionError):
        require_texts("chain", given)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["chain", "tree", "early exit"])
def test_draft_models_draft_what_they_would_draft_alone(name, mode):
    """With windows of their own, of which they read a little more than the target: every round accepts as much."""
    engine = engine_of(name, mode=mode)
    given = submit_all(engine, prompts_of(3, 40, seed=1), KINDS[:2])
    run(engine, poison=True)
    for handle, prompt, options in given:
        out = solo_generator(name).generate(torch.tensor([prompt]), shapes=handle.shapes, **options)
        ours, theirs = handle.stats, out.stats.rows[0]
        assert (ours.accepted, ours.proposed, ours.ranks) == (theirs.accepted, theirs.proposed, theirs.ranks)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["none", "chain", "tree", "Medusa heads", "early exit"])
def test_a_long_row_owns_the_pages_of_its_window_and_of_a_round(name, mode):
    """A text of 38 pages and a window of 3, in all caches."""
    engine = engine_of(name, mode=mode, max_tokens_per_step=8)
    handle, room = engine.submit(text_of(40), max_new_tokens=110, eos_token_id=[]), engine._memory._room
    assert engine._memory.caches[0].pages_for(handle.limit) == 38
    in_flight = 3 if mode == "graph" else 2  # rounds of which pages are taken, the last one read among them
    while not engine.idle:
        engine.step()
        for held in engine._memory.caches if handle.row is not None and handle.tokens else ():
            assert held.stats().owned <= 1 + held.pages_for(WINDOW + in_flight * (room + 1))
    assert handle.tokens == solo(name, handle.prompt, {"max_new_tokens": 110, "eos_token_id": []})
    require_empty(engine)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["none", "prompt lookup", "Medusa heads", "early exit"])
def test_a_prompt_longer_than_the_cache_runs_where_its_window_fits(name, mode):
    """In chunks, with nothing to share left of its front; a page less is refused."""
    pages = engine_of(name, max_tokens_per_step=8)._memory._at_once()
    engine = engine_of(name, pages, mode, max_tokens_per_step=8)
    prompt = text_of(130)
    assert len(prompt) > 2 * pages * PAGE
    given = [(engine.submit(prompt, max_new_tokens=20), prompt, {"max_new_tokens": 20}) for _ in range(2)]
    assert run(engine, poison=True) <= pages
    require_texts(name, given)
    require_empty(engine)
    with pytest.raises(ValueError, match=f"{pages - 1} pages .* give the engine more memory"):
        engine_of(name, pages - 1, max_tokens_per_step=8).submit(prompt, max_new_tokens=20)


@pytest.mark.covering(cases=1)
@pytest.mark.parametrize("shapes", [None, 1], ids=["one shape", "shapes that change"])
@pytest.mark.parametrize("name", ["none", "chain", "tree"])
def test_requests_that_make_room_are_computed_again(name, mode, shapes):
    """Blocks of the front are lost to other rows meanwhile, so that the rest of a text is no prefix any more."""
    engine = engine_of(name, 40, mode, tree=None if shapes is None else "auto", max_tokens_per_step=16)
    if shapes is not None:
        force(engine, at_random(shapes))
    seem_full_at_times(engine, seed=5)
    given = submit_all(engine, prompts_of(12, 40, seed=2), [{}, dict(repetition_penalty=1.2)])
    run(engine, poison=True)
    assert sum(handle.preemptions for handle, *_ in given) > 0
    require_texts(name, given)
    require_empty(engine)


@pytest.mark.parametrize("name", ["none", "chain"])
def test_the_front_of_a_row_that_runs_is_shared(name):
    """Blocks that a row has given back are taken over by others, while it runs and after it; they go on alike."""
    engine = engine_of(name)
    prompt = prompts_of(1, 90)[0]
    first = engine.submit(prompt, max_new_tokens=40, eos_token_id=[])
    while len(first.tokens) < 20:
        engine.step()
    text = [*prompt, *first.tokens]
    row = first.row
    assert engine.target.cache.table.freed_pages(row.sequence) >= 8
    second = engine.submit(text, max_new_tokens=10, eos_token_id=[])
    engine.step()
    saved = engine.stats()["saved_tokens"]
    assert saved >= len(text) - 2 * PAGE - engine._memory._room
    assert engine.target.cache.table.freed_pages(second.row.sequence) >= 8, "it gives them back at once"
    run(engine, poison=True)
    third = engine.submit(text, max_new_tokens=5, eos_token_id=[])
    run(engine)
    assert engine.stats()["saved_tokens"] >= 2 * saved
    expected = solo(name, prompt, {"max_new_tokens": 40, "eos_token_id": []})
    assert first.tokens == expected and third.tokens == second.tokens[:5]
    assert second.tokens == expected[len(text) - len(prompt) :][:10]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_a_model_with_a_layer_that_sees_the_whole_text_keeps_it(family):
    engine = engine_of(family=family)
    assert engine.target.adapter.window is None and not engine._memory.windowed
    handle = engine.submit(prompts_of(1, 40)[0], max_new_tokens=20, eos_token_id=[])
    while not handle.tokens:
        engine.step()
    held = engine.target.cache
    assert len({*held.pages(handle.row.sequence)}) == held.pages_for(handle.row.length - 1)
    run(engine)
    assert handle.tokens == solo("none", handle.prompt, {"max_new_tokens": 20, "eos_token_id": []}, family)


@pytest.mark.parametrize("change", ["sliding_window", "layer_types"])
def test_windows_that_change_after_the_probe_free_nothing(change):
    model = build("mistral")
    runner = specdec.ModelRunner(model, page_size=PAGE, mode="eager")
    assert runner.adapter.window == WINDOW
    engine = specdec.Engine(runner, memory=200 * runner.page_format.bytes)
    if change == "sliding_window":
        model.config.sliding_window = None
    else:
        model.config.layer_types = ["full_attention"] * 3
    prompt = prompts_of(1, 60)[0]
    handle = engine.submit(prompt, max_new_tokens=20, eos_token_id=[])
    run(engine, poison=True, flush=True)
    assert runner.adapter.window is None
    out = specdec.AutoregressiveGenerator(model, mode="eager").generate(torch.tensor([prompt]), max_new_tokens=20,
                                                                       eos_token_id=[])  # fmt: skip
    assert handle.tokens == out.sequences[0, len(prompt) :].tolist()


@pytest.mark.thorough
@settings(max_examples=25, derandomize=True, deadline=None, database=None, phases=(Phase.generate,))
@given(
    name=st.sampled_from(["none", "chain", "tree", "early exit", "dynamic tree"]),
    mode=st.sampled_from(["eager", "graph"]),
    pages=st.integers(20, 60), tokens=st.sampled_from([5, 8, 32]), rows=st.sampled_from([2, 64]),
    shapes=st.sampled_from([None, 0, 1]), count=st.integers(1, 6), seed=st.integers(0, 3), flush=st.booleans(),
)  # fmt: skip
def test_whatever_the_memory_and_the_load(name, mode, pages, tokens, rows, shapes, count, seed, flush):
    engine = engine_of(name, pages, mode, tree=None if shapes is None else "auto", max_tokens_per_step=tokens,
                       max_rows=rows)  # fmt: skip
    for held in engine._memory.caches:
        held.table.debug = True
    force(engine, at_random(shapes))
    seem_full_at_times(engine, seed)
    submitted = submit_all(engine, prompts_of(count, 36, seed), [dict(max_new_tokens=30)])
    run(engine, poison=True, flush=flush)
    require_texts("none", submitted)
    require_empty(engine)
