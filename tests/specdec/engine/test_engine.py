"""Requests in an engine get the texts that they would get alone, whatever else runs, fails or makes room."""

import random
from functools import cache

import pytest
import torch
from transformers.generation import LogitsProcessor

import specdec
from specdec.drafters.base import runners_of
from specdec.drafters.early_exit import first_layers
from tests.families import build, noisy_copy
from tests.matrix import DRAFTERS, word_tokenizer, words

NAMES = ("none", *DRAFTERS)
KINDS = (  # settings that end up in different groups, or in one with other numbers
    {}, dict(do_sample=True, temperature=0.8), dict(do_sample=True, temperature=1.3), dict(do_sample=True, top_p=0.9),
    dict(repetition_penalty=1.2), dict(no_repeat_ngram_size=2), dict(max_new_tokens=5), dict(eos_token_id=[7, 8, 9]),
)  # fmt: skip
PAGE = 4
ALONE: dict[tuple, list[int]] = {}  # see `tokens_alone`


class Own(LogitsProcessor):
    """A user's processor, which runs on the host; it raises after `limit` calls' worth of text."""

    def __init__(self, limit=10**9):
        self.limit = limit

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.limit:
            raise ArithmeticError("enough")
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 5 == 0, float("-inf"))


def drafter_of(name, model):
    drafter = None if name == "none" else DRAFTERS[name](model, noisy_copy("llama"))
    for runner in runners_of(drafter):
        runner.page_size = PAGE
    return drafter


@cache
def model_of():
    return build("llama")


def engine_of(name="chain", pages=200, **options):
    """An engine with small pages, so many that all caches together have `pages` each."""
    runner = specdec.ModelRunner(model_of(), page_size=PAGE, mode="eager")
    drafter = drafter_of(name, model_of())
    own = [one for one in runners_of(drafter) if not one.borrows_cache]
    memory = pages * sum(one.page_format.bytes for one in (runner, *own))
    return specdec.Engine(runner, drafter, memory=memory, **{"max_tokens_per_step": 64, "tree": None} | options)


def prompts_of(count, seed=0, shared=24):
    """Texts that begin alike, some of them longer than a chunk of a step."""
    draws = random.Random(seed)
    number = lambda: draws.randrange(10, 90)
    base = [number() for _ in range(shared)]
    return [base[: draws.randrange(1, shared)] + [number() for _ in range(draws.randrange(1, 6))] for _ in range(count)]


@cache
def solo_generator(name):
    return specdec.SpeculativeGenerator(model_of(), drafter_of(name, model_of()), mode="eager")


def tokens_alone(generator, prompt, options):
    """The new tokens of a request that runs alone; those of equal requests with plain settings are found once."""
    plain = (
        all(isinstance(value, int | float | list) for value in options.values()) and "logits_processor" not in options
    )
    key = generator, tuple(prompt), repr(sorted(options.items()))
    if plain and key in ALONE:
        return list(ALONE[key])
    ids = torch.tensor([prompt])  # without a mask a forked text that ends with the pad token would count as padded
    out = generator.generate(ids, torch.ones_like(ids), **options)
    found = out.sequences[0, len(prompt) : len(prompt) + int(out.lengths[0])].tolist()
    if plain:
        ALONE[key] = list(found)
    return found


def solo(name, prompt, options):
    """The new tokens of a request that runs alone in a generator."""
    return tokens_alone(solo_generator(name), prompt, {"max_new_tokens": 16} | options)


def require_empty(engine):
    """Nothing is at work and no page is owned; what the caches say of themselves fits together."""
    assert engine.idle and not engine._handles
    for held in engine._memory.caches:
        assert held.sequences == () and held.stats().owned == 0 and held.free_pages == held.num_pages
        held.table.check_integrity()
    for index in engine._prefixes.indexes:
        index.check_integrity()


def submit_all(engine, prompts, kinds=KINDS, **options):
    """One request a prompt, of all kinds in turn -> (handle, prompt, its settings)."""
    settings = [{"seed": i} | kinds[i % len(kinds)] for i in range(len(prompts))]
    handles = [
        engine.submit(prompt, **{"max_new_tokens": 16} | chosen | options)
        for prompt, chosen in zip(prompts, settings, strict=True)
    ]
    return list(zip(handles, prompts, settings, strict=True))


@pytest.mark.covering(cases=8)
@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_requests_alone(name):
    """Greedy, sampled and penalised ones together, with and without an end; prompts beside rounds in one forward."""
    engine = engine_of(name)
    given = submit_all(engine, prompts_of(8))
    finished = list(engine.run())
    assert len(finished) == len(given) == len(set(finished)) and all(handle.error is None for handle in finished)
    for handle, prompt, options in given:
        assert handle.tokens == solo(name, prompt, options), options
        assert handle.reason == ("end" if handle.tokens[-1] in handle.request.eos else "length")
        assert handle.reason == "end" or len(handle.tokens) == handle.request.max_new_tokens
    require_empty(engine)


@pytest.mark.covering(cases=3)
@pytest.mark.parametrize(
    "name", ["none", "chain", "tree", "dynamic tree", "Medusa heads", "early exit", "quantised self", "translated"]
)
def test_requests_that_make_room_are_computed_again(name):
    """A cache of a few requests' size: greedy texts are the same, and seeded ones where rounds keep their shape."""
    kinds = KINDS if name != "Medusa heads" else ({}, dict(repetition_penalty=1.2))  # it has a round without features
    engine = engine_of(name, pages=30 if name in ("early exit", "quantised self") else 44)
    given = submit_all(engine, prompts_of(14), kinds)
    for _ in engine.run():
        for held in engine._memory.caches:
            held.table.check_integrity()
        for index in engine._prefixes.indexes:
            index.check_integrity()
    assert sum(handle.preemptions for handle, *_ in given) > 0
    for handle, prompt, options in given:
        assert handle.tokens == solo(name, prompt, options), options
    require_empty(engine)


@pytest.mark.parametrize("name", ["none", "chain"])
def test_a_prefix_that_arrives_together_is_computed_once(name):
    base = prompts_of(1, shared=90)[0] * 3
    prompts = [base[:80] + [20 + i] * (i % 3 + 1) for i in range(10)]
    engine, done = engine_of(name, pages=400), []
    forward = engine.target.forward
    engine.target.forward = lambda s, tokens, *a, **k: done.append(len(tokens)) or forward(s, tokens, *a, **k)
    given = submit_all(engine, prompts, ({},), max_new_tokens=1)
    assert len(list(engine.run())) == 10
    drafted = 5 if name == "chain" else 1  # nodes of each round
    assert sum(done) <= 1.05 * 80 + sum(len(prompt) - 80 for prompt in prompts) + 10 * drafted + 10 * PAGE
    assert engine.stats()["saved_tokens"] == 9 * 80
    for handle, prompt, _ in given:
        assert handle.tokens == solo(name, prompt, {"max_new_tokens": 1})
    again = engine.submit(prompts[0], max_new_tokens=4)  # the prefix is still there
    list(engine.run())
    assert engine.stats()["saved_tokens"] == 10 * 80 and again.tokens == solo(name, prompts[0], {"max_new_tokens": 4})


def test_weights_that_change_leave_no_block_behind():
    model = build("llama")
    runner = specdec.ModelRunner(model, page_size=PAGE, mode="eager")
    engine, prompt = specdec.Engine(runner, memory=1 << 20), prompts_of(1)[0] * 2
    first = engine.submit(prompt, max_new_tokens=6)
    list(engine.run())
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)
    second = engine.submit(prompt, max_new_tokens=6)
    list(engine.run())
    fresh = specdec.AutoregressiveGenerator(model, mode="eager").generate(torch.tensor([prompt]), max_new_tokens=6)
    assert second.tokens == fresh.sequences[0, len(prompt) :].tolist() != first.tokens
    assert engine.stats()["saved_tokens"] == 0


@pytest.mark.parametrize("name", ["none", "chain", "tree"])
def test_a_request_that_fails_fails_alone(name):
    """Callbacks, processors and criteria that raise, in the middle of their texts."""

    def callback(handle, new_tokens):
        if len(handle.tokens) > 4:
            raise LookupError("seen enough")

    def criterion(ids, scores):
        if ids.shape[1] > 30:
            raise OSError("gone")
        return False

    engine, prompts = engine_of(name), [prompt + [11] * 8 for prompt in prompts_of(6)]
    good = submit_all(engine, prompts, KINDS[:5])
    bad = {
        LookupError: engine.submit(prompts[0], max_new_tokens=16, callback=callback),
        RuntimeError: engine.submit(prompts[1], max_new_tokens=16, logits_processor=[Own(len(prompts[1]) + 3)]),
        OSError: engine.submit(prompts[2], max_new_tokens=40, stopping_criteria=[criterion]),
    }
    host = engine.submit(prompts[3], max_new_tokens=9, logits_processor=[Own()])
    list(engine.run())
    for kind, handle in bad.items():
        error = handle.error.__cause__ if kind is OSError else handle.error
        assert handle.reason == "error" and isinstance(error, kind), handle.error
    assert 0 < len(bad[LookupError].tokens) < 16
    for handle, prompt, options in good:
        assert handle.error is None and handle.tokens == solo(name, prompt, options)
    assert host.tokens == solo(name, prompts[3], dict(max_new_tokens=9, logits_processor=[Own()]))
    require_empty(engine)


def test_stops_priorities_and_cancelled_requests():
    tokenizer = word_tokenizer(words(97))
    engine = engine_of("chain", max_rows=1, tokenizer=tokenizer)
    last = engine.submit("w11 w12 w13", max_new_tokens=3)
    first = engine.submit([11, 12, 14], max_new_tokens=3, priority=1)
    dropped = engine.submit(torch.tensor([[11, 12, 15]]), max_new_tokens=3)
    engine.cancel(dropped)
    stopped = engine.submit([21, 22], max_new_tokens=9, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 4])
    assert [handle for handle in engine.run()] == [first, last, stopped]
    assert (dropped.reason, dropped.tokens, stopped.reason, len(stopped.tokens)) == ("cancelled", [], "stop", 2)
    assert last.text == " ".join(f"w{token}" for token in last.tokens) and last.stats.rounds >= 1
    running = engine.submit([11, 12], max_new_tokens=30)
    engine.step()
    engine.cancel(running)
    engine.cancel(running)
    assert running.reason == "cancelled"
    require_empty(engine)


def test_bad_input_is_refused_and_the_engine_goes_on():
    engine = engine_of("chain", pages=20)
    good = engine.submit([11, 12, 13], max_new_tokens=5, id="a")
    for error, match, call in (
        (ValueError, "90 tokens and 16 new ones do not fit into 20 pages",
         lambda: engine.submit([11] * 90, max_new_tokens=16)),
        (ValueError, "id 'a' is at work", lambda: engine.submit([11], id="a")),
        (ValueError, "temperature must be > 0", lambda: engine.submit([11], do_sample=True, temperature=0.0)),
        (ValueError, "needs Engine\\(tokenizer", lambda: engine.submit("text")),
        (ValueError, r"got \[2, 1\]", lambda: engine.submit([[11], [12]])),
        (TypeError, "no option", lambda: engine.submit([11], temprature=1.0)),
        (ValueError, "submit it 3 times", lambda: engine.submit([11], do_sample=True, num_return_sequences=3)),
        (ValueError, "got 0 and", lambda: engine_of(max_tokens_per_step=0)),
        (ValueError, "got 0 and|takes .* got 0", lambda: specdec.Engine(model_of(), memory=0)),
        (ValueError, "handle.text needs", lambda: good.text),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    assert list(engine.run()) == [good] and good.tokens == solo("chain", [11, 12, 13], {"max_new_tokens": 5})
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.submit([11])
    with pytest.raises(ValueError, match="not the generator's target"):
        specdec.Engine(model_of(), specdec.EarlyExitDrafter(noisy_copy("llama"), 1))


def test_samples_without_a_seed_differ():
    engine, seen = engine_of("chain"), []
    for _ in range(2):
        seen += [engine.submit([11, 12], max_new_tokens=12, do_sample=True) for _ in range(3)]
        list(engine.run())
    assert len({tuple(handle.tokens) for handle in seen}) == 6


def test_callbacks_may_use_the_engine_but_not_run_it():
    """One that cancels its own request and raises, one that steps, and one that changes what it was given."""
    engine, seen = engine_of("Medusa heads"), []

    def cancels(handle, new_tokens):
        engine.cancel(handle)
        raise LookupError("too late")

    def clears(handle, new_tokens):
        seen.extend(new_tokens)
        new_tokens.clear()

    cancelled = engine.submit([11, 12], max_new_tokens=9, callback=cancels)
    stepping = engine.submit([11, 13], max_new_tokens=9, callback=lambda handle, new_tokens: engine.step())
    cleared = engine.submit([11, 14], max_new_tokens=9, callback=clears)
    assert {*engine.run()} == {cancelled, stepping, cleared}
    assert (cancelled.reason, stepping.reason, cleared.reason) == ("cancelled", "error", "length")
    assert "a callback cannot run its engine" in str(stepping.error)
    assert seen == cleared.tokens == solo("Medusa heads", [11, 14], {"max_new_tokens": 9})
    assert cleared.stats.shapes[1:].count("plain") == 0  # it was drafted for
    require_empty(engine)


def test_a_request_without_an_id_gets_one_that_is_free():
    engine = engine_of("none")
    named, unnamed = engine.submit([11], id=1, max_new_tokens=2), engine.submit([12], max_new_tokens=2)
    assert named.id == 1 != unnamed.id and len(list(engine.run())) == 2


@pytest.mark.parametrize("name", ["none", "chain", "early exit"])
def test_a_step_that_breaks_loses_nothing(name):
    """The model raises in some forwards, of prompts too: the step raises, and all texts are right in the end."""
    engine = engine_of(name)
    forward, calls = engine.target.forward_batch, []

    def breaks(*arguments, **options):
        calls.append(1)
        if len(calls) in (1, 4, 5, 9):
            raise FloatingPointError("no more memory, say")
        return forward(*arguments, **options)

    engine.target.forward_batch = breaks
    given, broken = submit_all(engine, prompts_of(8)), 0
    while not engine.idle:
        try:
            engine.step()
        except FloatingPointError:
            broken += 1
    assert broken == 4
    for handle, prompt, options in given:
        assert handle.error is None and handle.tokens == solo(name, prompt, options), options
    require_empty(engine)


def test_a_draft_model_that_shares_the_targets_layers_has_a_cache_of_its_own():
    """Its memory is part of the engine's; early exit, whose layers are shared too, runs in the target's."""
    for drafter, caches in ((specdec.ModelDrafter(first_layers(model_of(), 1), 2), 2),
                            (specdec.EarlyExitDrafter(model_of(), 1, 2), 1)):  # fmt: skip
        engine = specdec.Engine(model_of(), drafter, memory=1 << 22)
        assert len(engine._memory.caches) == caches
        handles = [engine.submit([n + 1] * 100, max_new_tokens=8, eos_token_id=[]) for n in range(4)]
        list(engine.run())
        assert all(handle.error is None and len(handle.tokens) == 8 for handle in handles)
        require_empty(engine)
