"""An engine whose target keeps recurrent states: rows that come, fork, make room, are cancelled and come back."""

import random
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

import attention.hf.mixers as mixers
import specdec
import specdec.engine.engine as engine_module
from attention.kv.recurrent import RecurrentStates
from attention.kv.state_pool import StatePool, bytes_of
from specdec.drafters.base import runners_of
from specdec.engine.memory import cache_sizes
from tests.families import RECURRENT, VOCAB, build, noisy_copy
from tests.specdec.engine import test_engine, test_machine
from tests.specdec.engine.forced import at_random, force
from tests.specdec.engine.test_engine import KINDS, PAGE, prompts_of, require_empty, submit_all
from tests.specdec.engine.test_machine import PAGES, REQUEST

TREE = specdec.TokenTree((None, 0, 0, 1, 1, 3))
DRAFTERS = {
    "none": lambda target: None,
    "chain": lambda target: specdec.ModelDrafter(copy_of(target), 4),
    "chain of a plain model": lambda target: specdec.ModelDrafter(noisy_copy("llama"), 4),
    "tree": lambda target: specdec.ModelDrafter(copy_of(target), tree=specdec.TokenTree((None, 0, 0, 1, 1, 3))),
    "early exit": lambda target: specdec.EarlyExitDrafter(target, 2, num_tokens=3),
    "prompt lookup": lambda target: specdec.PromptLookupDrafter(5, 2),
}


FAMILY = "bamba"


@cache
def model_of(family=FAMILY):
    return build(family)


@cache
def copy_of(target):
    """A draft model that agrees with `target` now and then."""
    return noisy_copy(next(family for family, make in RECURRENT.items() if type(make()) is type(target.config)))


def drafter_of(name, model):
    drafter = DRAFTERS[name](model)
    for runner in runners_of(drafter):
        runner.page_size = PAGE
    return drafter


def run_on_hybrids(monkeypatch, family):
    """Let engines and solo runs of other tests have a target with recurrent states."""
    solo_generator = cache(test_engine.solo_generator.__wrapped__)
    for module in (test_engine, test_machine):
        monkeypatch.setattr(module, "model_of", partial(model_of, family))
        monkeypatch.setattr(module, "drafter_of", drafter_of)
    monkeypatch.setattr(test_engine, "solo_generator", solo_generator)
    monkeypatch.setattr(test_machine, "alone", cache(test_machine.alone.__wrapped__))


def memory_for(runners, pages, cells, rollback=16):
    """Bytes with which an engine has so many pages in each cache, and so many rows with states."""
    states = sum(
        bytes_of(layer, runner.dtype, rollback) for runner in runners for layer in runner.page_format.layout.recurrent
    )
    return pages * sum(runner.page_format.bytes for runner in runners) + (cells + (cells > 1)) * states


def engine_of(name, pages=200, rows=8, mode="auto", **options):
    runner = specdec.ModelRunner(model_of(), page_size=PAGE, mode=mode)
    drafter = drafter_of(name, model_of())
    own = [one for one in runners_of(drafter) if not one.borrows_cache]
    options = {"max_tokens_per_step": 64, "tree": None, "max_rows": rows} | options
    return specdec.Engine(runner, drafter, memory=memory_for([runner, *own], pages, rows), **options)


@pytest.mark.parametrize("name", DRAFTERS)
def test_texts_are_those_of_requests_alone(name, monkeypatch):
    """Greedy, sampled and penalised ones together; prompts in chunks beside rounds in one forward."""
    run_on_hybrids(monkeypatch, FAMILY)
    engine = engine_of(name)
    given = submit_all(engine, prompts_of(5), kinds=({}, *KINDS[1:4], KINDS[7]), max_new_tokens=10)
    assert all(handle.error is None for handle in engine.run())
    for handle, prompt, options in given:
        assert handle.tokens == test_engine.solo(name, prompt, options | dict(max_new_tokens=10)), options
    require_empty(engine)


def test_requests_wait_for_a_state():
    """Three rows may have one: others wait, and those that end hand theirs on."""
    engine = engine_of("none")
    states = engine.target.cache.states
    states._free = states._free[:3]
    given = submit_all(engine, prompts_of(7), kinds=({},))
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, len(engine._scheduler.running))
    assert most == 3 and all(handle.reason in ("length", "end") for handle, *_ in given)
    assert states.free_cells == 3


def texts_with_reuse(engine, cases, at_once=3):
    """The handles of cases, `(prompt, options)`, some at once, after they have run, and how many tokens were saved."""
    handles, before = [], engine.stats()["saved_tokens"]
    for first in range(0, len(cases), at_once):
        handles += [engine.submit(prompt, **options) for prompt, options in cases[first : first + at_once]]
        list(engine.run())
    assert all(handle.error is None for handle in handles)
    return handles, engine.stats()["saved_tokens"] - before


def random_cases(count, seed, logprobs):
    """Prompts of a few blocks that many of them begin with, and of own tokens; greedy and sampled ones."""
    draw, cases = random.Random(seed), []
    blocks = [[draw.randrange(3, VOCAB) for _ in range(PAGE)] for _ in range(3)]
    for number in range(count):
        prompt = [token for _ in range(draw.randrange(5)) for token in draw.choice(blocks)]
        prompt = prompt[: draw.choice([len(prompt), len(prompt) + 1, 3 * PAGE])]
        prompt += [draw.randrange(3, VOCAB) for _ in range(draw.choice([0, 1, 2, PAGE, PAGE + 1]))]
        options = dict(
            max_new_tokens=draw.choice([1, 3]), do_sample=draw.random() < 0.7, seed=number, logprobs=logprobs
        )
        cases.append((prompt or [5], options))
    return cases


def compare_reuse(count, seed, name="prompt lookup", rows=4, mode="eager", pages=40):
    """Random cases with reuse against an engine that forgets all between them -> the tokens that reuse saved."""
    engine, other = (engine_of(name, pages=pages, rows=rows, mode=mode) for _ in range(2))
    known, other._prefixes.known = other._prefixes.known, lambda handle: 0
    cases = random_cases(count, seed, mode == "eager")  # which the host keeps
    ours, saved = texts_with_reuse(engine, cases)
    expected, none = texts_with_reuse(other, cases)
    assert none == 0
    for mine, its in zip(ours, expected, strict=True):
        assert mine.tokens == its.tokens
        assert torch.allclose(*(torch.tensor(one.record.logprobs) for one in (mine, its)), atol=1e-5)
    require_empty(engine)
    return saved


@pytest.mark.parametrize(("name", "rows", "mode"), [("prompt lookup", 5, "eager"), ("none", 6, "graph"),
                                                    ("chain of a plain model", 8, "eager")])  # fmt: skip
def test_prefix_reuse_equals_no_reuse(name, rows, mode):
    """Few cells and few pages: states and pages get lost, each by itself."""
    assert compare_reuse(50, rows, name, rows, mode) > 15 * PAGE


def test_a_prefix_with_the_state_of_another_one_is_caught(monkeypatch):
    """Planted bugs: a state of another prefix, and one that lacks the last tokens of its own."""
    resume = RecurrentStates.resume
    with monkeypatch.context() as patch:
        patch.setattr(RecurrentStates, "resume",
                      lambda self, sequence, length, key: resume(self, sequence, length, next(iter(self._kept))))  # fmt: skip
        with pytest.raises(AssertionError):
            compare_reuse(50, 5, rows=5)
    monkeypatch.setattr(StatePool, "replay", lambda self, *given: None)
    with pytest.raises(AssertionError):
        compare_reuse(50, 5, rows=5)


def test_states_are_kept_at_the_ends_of_prompts_and_where_texts_part():
    """A text takes over what a longer one with its beginning has left, from the second text on that parts there."""
    engine = engine_of("none", mode="eager")
    draw = random.Random(2)
    rand = lambda count: [draw.randrange(3, VOCAB) for _ in range(count)]
    shared, saved = rand(3 * PAGE), []
    for prompt in (shared + rand(PAGE + 2), shared + rand(2), shared + rand(PAGE), shared[:PAGE] + rand(PAGE)):
        for _ in range(2):
            _, count = texts_with_reuse(engine, [(prompt, dict(max_new_tokens=2))])
            saved.append(count // PAGE)
    assert saved == [0, 4, 0, 3, 3, 3, 0, 1]
    assert engine.target.cache.states.free_cells == 8 and engine.stats()["blocks"] > 0
    engine._prefixes.flush()
    assert texts_with_reuse(engine, [(shared, dict(max_new_tokens=2))])[1] == 0


def test_memory_goes_to_states_and_pages():
    """Half of the memory at most holds states; one that holds none is refused."""
    engine = engine_of("chain", pages=50, rows=4)
    drafts = [engine.drafter.runner]
    states, own = engine.target.cache.states, memory_for([engine.target, *drafts], 0, 1)
    assert states.cells == states.free_cells == 4 and engine.target.cache.num_pages >= 50
    held = sum(x.element_size() * x[:, 0].numel() for pool in states.pools for x in (pool.states, *pool.inputs))
    assert held == memory_for([engine.target], 0, 1, states.rollback)
    engine.close()
    with pytest.raises(ValueError, match="a row's recurrent states take"):
        specdec.Engine(engine.target, engine.drafter, memory=own)


def test_a_step_that_breaks_starts_over(monkeypatch):
    """States that a broken forward left half-way are not gone on with."""
    engine, run, calls = engine_of("none", mode="eager"), mixers.run_recurrent, []
    prompts = [prompts_of(1)[0] * 3, prompts_of(2)[1]]
    handles = [engine.submit(prompt, max_new_tokens=10) for prompt in prompts]

    def breaks(*args):
        calls.append(args)
        if len(calls) in (3, 22):
            raise RuntimeError("planted")
        return run(*args)

    monkeypatch.setattr(mixers, "run_recurrent", breaks)
    broken = 0
    while not engine.idle:
        try:
            engine.step()
        except RuntimeError:
            broken += 1
    assert broken == 2
    generator = specdec.AutoregressiveGenerator(model_of())
    for handle, prompt in zip(handles, prompts, strict=True):
        expected = generator.generate(torch.tensor([prompt]), max_new_tokens=10).sequences[0, len(prompt) :].tolist()
        assert handle.tokens == expected[: len(handle.tokens)] and handle.reason in ("end", "length")


class OnHybrids(test_machine.Requests):
    """The same random calls; three or eight rows may have a state."""

    mode = "auto"

    @initialize(
        name=st.sampled_from(["none", "chain", "tree", "early exit", "prompt lookup"]),
        tokens=st.sampled_from([12, 64]), rows=st.sampled_from([3, 8]), shapes=st.sampled_from([None, 0, 1]),
        requests=st.lists(REQUEST, min_size=4, max_size=8),
    )  # fmt: skip
    def start(self, name, tokens, rows, shapes, requests):
        self.name, self.options, self.shapes = name, {"max_tokens_per_step": tokens, "max_rows": rows}, shapes
        self.target = specdec.ModelRunner(test_machine.model_of(), page_size=PAGE, mode=self.mode)
        self.drafter = drafter_of(name, test_machine.model_of())
        self.open()
        self.submit(requests, None, 2)

    def open(self):
        tree = None if self.shapes is None else "auto"
        self.engine = specdec.Engine(self.target, self.drafter, tree=tree, **self.options)
        force(self.engine, at_random(self.shapes))


@pytest.mark.parametrize(("family", "mode"), [("qwen3_5", "eager"), ("jamba", "eager"), ("lfm2", "graph")])
def test_random_calls(family, mode, monkeypatch):
    run_on_hybrids(monkeypatch, family)
    monkeypatch.setattr(OnHybrids, "mode", mode)
    sizes = lambda *given: replace(cache_sizes(*given), pages=PAGES)
    monkeypatch.setattr(engine_module, "cache_sizes", sizes)
    OnHybrids.counts.clear()
    run_state_machine_as_test(OnHybrids, settings=settings(
        max_examples=5, stateful_step_count=10, derandomize=True, deadline=None, database=None,
        phases=(Phase.generate,),
    ))  # fmt: skip
    assert OnHybrids.counts["preemptions"] and OnHybrids.counts["forks"], OnHybrids.counts
