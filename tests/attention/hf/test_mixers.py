"""The recurrent functions of transformers' mixers: served in a forward of ours, the originals everywhere else."""

import sys
import threading

import pytest
import torch

import attention.hf.mixers as mixers
import attention.recurrent.batch as recurrent_batch
from attention import PagedKVCache, UnsupportedArchitecture
from attention.hf.mixers import ORIGINAL, serving
from tests.attention.hf import test_adapter
from tests.attention.hf.test_adapter import Pages, alone, assert_same, tokens
from tests.families import RECURRENT, build

pytestmark = pytest.mark.seam


@pytest.mark.parametrize("family", RECURRENT)
def test_the_model_itself_calls_the_originals(family):
    """Bit for bit the same logits and texts after our functions took their places, which happens once."""
    model, prompt = build(family), tokens(17)
    names = {type(module).__module__ for module in model.modules()}
    for name in names:  # as they were before any test
        for function, held in list(vars(sys.modules[name]).items()):
            if hasattr(held, ORIGINAL):
                setattr(sys.modules[name], function, vars(held)[ORIGINAL])
    before = alone(model, prompt), model.generate(prompt[None], do_sample=False, max_new_tokens=5)
    Pages(model).forward([prompt, prompt])
    held = [f for name in names for f in vars(sys.modules[name]).values() if hasattr(f, ORIGINAL)]
    assert held and not any(hasattr(vars(f)[ORIGINAL], ORIGINAL) for f in held)
    Pages(build(family))
    assert held == [f for name in names for f in vars(sys.modules[name]).values() if hasattr(f, ORIGINAL)]
    assert alone(model, prompt).equal(before[0])
    assert model.generate(prompt[None], do_sample=False, max_new_tokens=5).equal(before[1])


def test_another_thread_calls_the_originals_meanwhile(monkeypatch):
    """The model runs by itself in a thread that starts while a forward of ours is half-way."""
    model, prompt = build("qwen3_next"), tokens(9)
    expected, seen, pages = alone(model, prompt), [], Pages(model)
    run = mixers.run_recurrent

    def interrupted(*args):
        if not seen:
            thread = threading.Thread(target=lambda: seen.append((serving.get(), alone(model, prompt))))
            thread.start()
            thread.join()
        return run(*args)

    monkeypatch.setattr(mixers, "run_recurrent", interrupted)
    for ours in pages.forward([prompt, prompt]):
        assert_same(ours, expected)
    (slot, meanwhile), *_ = seen
    assert slot is None and meanwhile.equal(expected) and serving.get() is None


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "mamba2", "jamba", "lfm2"])
def test_a_node_that_starts_from_another_parent_is_caught(family, monkeypatch):
    """A planted bug: one node's state comes from its parent's sibling."""
    tables = recurrent_batch.seen_of

    def wrong(words):
        sees = tables(words)
        sees[5] = sees[1] | (torch.arange(len(words)) == 5)  # a child of node 2
        return sees

    monkeypatch.setattr(recurrent_batch, "seen_of", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        test_adapter.test_a_tree_node_equals_the_model_on_its_linear_path(family)


@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_a_broken_forward_leaves_nothing_to_go_on_with(family, monkeypatch):
    """Some layers' states have seen its tokens: the sequence can be emptied and run again, no more."""
    pages, prompts = Pages(build(family)), [tokens(70), tokens(60)]
    run, calls = mixers.run_recurrent, []

    def breaks(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("planted")
        return run(*args)

    monkeypatch.setattr(mixers, "run_recurrent", breaks)
    with pytest.raises(RuntimeError, match="planted"):
        pages.forward(prompts)
    monkeypatch.undo()
    pages.cache.append(pages.sequences, [1, 1])
    with pytest.raises(ValueError, match=r"a forward over sequences \[1, 2\] broke"):
        pages.step([tokens(1), tokens(1)])
    for sequence in pages.sequences:
        pages.cache.truncate(sequence, 60)
        assert pages.cache.length(sequence) == 0
    for ours, prompt in zip(pages.forward(prompts), prompts, strict=True):
        assert_same(ours, alone(pages.adapter.model, prompt))


def test_a_mixer_that_was_replaced_is_noticed():
    pages = Pages(build("qwen3_next"))
    pages.adapter.twin.model.model.layers[0].linear_attn.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(UnsupportedArchitecture, match="called recurrent functions 2 times over the paged cache"):
        pages.forward([tokens(3), tokens(3)])


def test_a_cache_without_states_is_refused():
    pages = Pages(build("qwen3_next"))
    pages.cache = PagedKVCache(1, 40, 4, 2, 16)
    pages.sequences = [pages.cache.add(), pages.cache.add()]
    with pytest.raises(UnsupportedArchitecture, match="more often than when it was probed"):
        pages.forward([tokens(3), tokens(3)])
