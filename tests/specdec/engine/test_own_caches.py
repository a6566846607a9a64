"""Draft models with caches of their own in an engine: what they read again, the room they take, weights that move."""

import copy

import pytest
import torch

import specdec
from specdec.drafters.base import runners_of
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.feature_state import FeatureState
from specdec.engine.memory import weights_now
from tests.families import noisy_copy
from tests.learned import deep_mtp, eagle3, fitted, mtp
from tests.matrix import at_each_run
from tests.specdec.engine.forced import make_room
from tests.specdec.engine.test_engine import PAGE, model_of, prompts_of, require_empty, tokens_alone

READERS = {
    "EAGLE-3": lambda: eagle3(model_of(), 3),
    "EAGLE-3, dynamic tree": lambda: eagle3(model_of(), dynamic=(9, 4, 3)),
    "MTP": lambda: mtp(model_of(), 3),
    "MTP, a module a depth": lambda: deep_mtp(model_of()),
}
SAMPLED = dict(do_sample=True, temperature=0.8, max_new_tokens=40, eos_token_id=[], seed=3)


def engine_of(drafter, pages=200, mode="eager", **options):
    runner = specdec.ModelRunner(model_of(), page_size=PAGE, mode=mode)
    for one in runners_of(drafter):
        one.page_size = PAGE
    size = sum(one.page_format.bytes for one in (runner, *runners_of(drafter)))
    return specdec.Engine(runner, drafter, memory=pages * size, **{"max_tokens_per_step": 64, "tree": None} | options)


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", READERS)
def test_a_seed_gives_the_same_text_after_making_room(name, mode):
    """Twice while others of its kind run, and once while none is left, so that it comes back to a new group."""
    engine = engine_of(READERS[name](), mode=mode, max_rows=2)
    generator = specdec.SpeculativeGenerator(model_of(), READERS[name](), mode="eager")
    options = [SAMPLED, SAMPLED | {"max_new_tokens": 12}, *[SAMPLED | {"temperature": 0.5, "max_new_tokens": 8}] * 2]
    prompts = [*prompts_of(2), *prompts_of(2, seed=1)]
    first, second = (engine.submit(prompts[i], **options[i]) for i in (0, 1))
    for _ in range(2):
        until(engine, first, len(first.tokens) + 1)
        make_room(engine, first)
    until(engine, second, 12)
    until(engine, first, len(first.tokens) + 1)
    pairs = list(zip(prompts, options, strict=True))[2:]
    others = [engine.submit(prompt, priority=1, **chosen) for prompt, chosen in pairs]
    make_room(engine, first)
    assert not first.finished and second.finished
    list(engine.run())
    assert first.preemptions == 3
    for handle, chosen in zip((first, second, *others), options, strict=True):
        assert handle.tokens == tokens_alone(generator, handle.prompt, chosen)
        assert [shape.name == "plain" for shape in handle.shapes] == [True] + [False] * (len(handle.shapes) - 1)
    require_empty(engine)


def until(engine, handle, count):
    """Step until a request has `count` tokens."""
    while len(handle.tokens) < count and not handle.finished:
        engine.step()


@pytest.mark.parametrize("length", range(21, 25))
def test_a_window_shows_what_a_captured_round_reads_again(length, monkeypatch):
    """A drafter of two layers, of which the second one reads what the first one made of its window, drafts as if no
    page were given back: from the first captured round on, wherever a page ends."""
    catch_up, heard = FeatureState.catch_up, list[torch.Tensor]()

    def noted(state, batch):
        logits = catch_up(state, batch)
        at_each_run(lambda: heard.append(logits[0].clone()))
        return logits

    monkeypatch.setattr(FeatureState, "catch_up", noted)
    prompt, found = [10 + (i * i + i // 7) % 83 for i in range(length)], []
    for gives_back in (True, False):
        engine = engine_of(Eagle3Drafter(fitted(model_of(), num_layers=2), 3, window=5), mode="graph")
        if not gives_back:
            monkeypatch.setattr(engine._memory, "free_fronts", lambda rows: None)
        heard.clear()
        handle = engine.submit(prompt, max_new_tokens=12, eos_token_id=[])
        list(engine.run())
        assert handle.error is None and engine._groups._captured._rounds.count > 0
        found.append((list(heard), handle.tokens))
    (ours, text), (wanted, known) = found
    assert text == known and len(ours) == len(wanted) > 2
    for mine, one in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-5, rtol=0)


WIDE = {  # three levels of six nodes each are more than the four that they propose
    "dynamic tree": lambda: specdec.DynamicTreeDrafter(noisy_copy("llama"), 4, depth=4, width=6),
    "EAGLE-3, dynamic tree": lambda: eagle3(model_of(), dynamic=(4, 4, 6)),
    "merged trees": lambda: specdec.MergedDrafter(
        specdec.DynamicTreeDrafter(noisy_copy("llama"), 4, depth=4, width=6), specdec.PromptLookupDrafter(2, 2), 4
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_request_that_leaves_no_room_for_a_tree_as_it_grows_is_refused(name):
    """One page less than the expansion wants; with that page it runs."""
    (prompt,), options = prompts_of(1), dict(max_new_tokens=12, eos_token_id=[])
    wanted = -(-(len(prompt) + 12 + 24) // PAGE)
    with pytest.raises(ValueError, match=f"{wanted - 1} pages .* give the engine more memory"):
        engine_of(WIDE[name](), wanted - 1).submit(prompt, **options)
    engine = engine_of(WIDE[name](), wanted)
    handle = engine.submit(prompt, **options)
    assert [one.error for one in engine.run()] == [None] and len(handle.tokens) == 12
    require_empty(engine)


def test_blocks_outlive_the_first_captured_call():
    """Whose drafter moves its weights, once, before anything is computed with them."""
    network = copy.deepcopy(fitted(model_of(), num_heads=6, num_kv_heads=2, intermediate_size=40))
    drafter, prompt = Eagle3Drafter(network, 3), prompts_of(1)[0] * 2
    engine, before = engine_of(drafter, mode="graph"), weights_now(network)
    for _ in range(2):
        list(engine.run([{"prompt": prompt, "max_new_tokens": 8, "eos_token_id": []}]))
    assert weights_now(network) != before, "they must have moved"
    assert engine.stats()["saved_tokens"] > 0
