"""Draft models that see a window of the text and its first tokens only."""

import pytest
import torch

import specdec
from attention.kv.window import KeyWindow
from specdec.trees.tree import TokenTree
from tests.families import build, noisy_copy, ragged_prompts
from tests.learned import eagle3, mtp

WINDOW = KeyWindow(5, sinks=3)


def dense_logits(model, ids):
    """`[L, V]`: transformers' own, each token of `ids [1, L]` seeing what WINDOW says."""
    length = ids.shape[1]
    sees = torch.tensor(
        [[key <= query and WINDOW.holds(query, key) for key in range(length)] for query in range(length)]
    )
    mask = torch.zeros(1, 1, length, length).masked_fill(~sees, float("-inf"))
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]


@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.inference_mode()
def test_logits_are_those_of_the_dense_model_with_such_a_mask(family, mode):
    """Of a prompt in pieces over small pages, of single tokens after it, and of a tree's deepest node."""
    model = build(family)
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    wanted, runner = dense_logits(model, ids), specdec.ModelRunner(model, page_size=4, mode=mode, sees=WINDOW)
    assert (wanted - model(ids).logits[0]).abs().max() > 0.1, "the window must matter"
    runner.reserve([48])
    sequence, found = runner.cache.add(), []
    for start, end in ((0, 9), (9, 30), *((n, n + 1) for n in range(30, 37))):
        found.append(runner.forward([sequence], ids[0, start:end], [end - start]).logits)
    torch.testing.assert_close(torch.cat(found), wanted[:37], atol=2e-4, rtol=0)
    tree = TokenTree((None, 0, 0, 2))  # of which the path over node 2 is the text
    tokens = torch.cat([ids[0, 36:37], ids[0, :1], ids[0, 37:39]])
    runner.cache.truncate(sequence, 36)
    out = runner.forward([sequence], tokens, [4], tree=tree).logits
    torch.testing.assert_close(out[[0, 2, 3]], wanted[36:39], atol=2e-4, rtol=0)


MAKE = {
    "tree": lambda target: specdec.ModelDrafter(
        noisy_copy("llama"), tree=TokenTree.from_widths((2, 2, 1)), window=4, sinks=2
    ),
    "dynamic tree": lambda target: specdec.DynamicTreeDrafter(noisy_copy("llama"), 6, 3, 2, window=7),
    "EAGLE-3": lambda target: eagle3(target, 3, window=4, sinks=2),
    "MTP": lambda target: mtp(target, 3, window=4, sinks=2),
}


@pytest.mark.parametrize("name", MAKE)
def test_text_is_the_targets_own_whatever_the_window_is(name):
    """Greedy in captured rounds, and in an engine that shares prefixes; drafts differ from those without one."""
    target, (ids, mask) = build("llama"), ragged_prompts(3)
    wanted = specdec.AutoregressiveGenerator(target).generate(ids, mask, max_new_tokens=24).sequences
    drafter = MAKE[name](target)
    for mode in ("eager", "graph"):
        generator = specdec.SpeculativeGenerator(target, drafter, mode=mode)
        out = generator.generate(ids, mask, max_new_tokens=24)
        assert out.sequences.equal(wanted) and sum(out.stats.pooled.proposed) > 0
    engine = specdec.Engine(target, drafter)
    handles = [engine.submit(row[kept.bool()], max_new_tokens=24) for row, kept in zip(ids, mask, strict=True)]
    list(engine.run())
    assert [handle.tokens for handle in handles] == wanted[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("sinks", [0, 5])
def test_an_engine_gives_back_what_no_window_shows(sinks):
    target, held = build("llama"), {}
    for window in (None, 8):
        drafter = specdec.ModelDrafter(noisy_copy("llama"), 2, window=window, sinks=sinks if window else 0)
        engine = specdec.Engine(target, drafter, tree=None)
        engine.drafter.runner.page_size = 4
        handle, most = engine.submit(torch.arange(3, 60), max_new_tokens=60), 0
        while not engine.idle:
            engine.step()
            cache = engine.drafter.runner.cache
            most = max(most, cache.num_pages - cache.free_pages)
        held[window] = most
        assert len(handle.tokens) == 60
    assert held[8] < held[None] - 10


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: specdec.ModelDrafter(build("llama"), sinks=2), "sinks 2"),
        (lambda: specdec.ModelDrafter(build("llama"), window=0), "0"),
        (lambda: specdec.DynamicTreeDrafter(build("llama"), window=4, sinks=-1), "-1"),
        (
            lambda: specdec.ModelDrafter(build("mistral"), window=4, sinks=2),
            "sliding windows, beside which there are no 2",
        ),
    ],
)
def test_a_window_that_cannot_be_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
