"""Targets whose layers differ in shape, share keys and values, or keep latents give transformers' texts."""

from functools import cache

import pytest
import torch

import medusa
import specdec
from attention import UnsupportedArchitecture
from attention.native.library import why_unavailable
from tests.families import LATENT, UNEVEN, build, noisy_copy, ragged_prompts
from tests.matrix import TREE, random_heads

NEW, PAGE = 10, 4
FAMILIES = [*UNEVEN, *LATENT]
DRAFTERS = {
    "chain": lambda runner, family: specdec.ModelDrafter(noisy_copy(family), 4),
    "tree": lambda runner, family: specdec.ModelDrafter(noisy_copy(family), tree=TREE),
    "quantised self": lambda runner, family: specdec.QuantisedSelfDrafter(runner, 3, bits=8),
    "Medusa heads": lambda runner, family: medusa.MedusaDrafter(random_heads(runner.model), TREE),
    "early exit": lambda runner, family: specdec.EarlyExitDrafter(runner, 1, num_tokens=3),
}
CASES = [
    *((family, "eager", "chain") for family in FAMILIES),
    *((family, "graph", "tree") for family in (*UNEVEN, "deepseek_v3")),
    *((family, "compile", "chain") for family in (*UNEVEN, "deepseek_v3", "minicpm3")),
    *((family, "graph", "early exit") for family in ("gemma4", "deepseek_v3")),
    ("deepseek_v3", "eager", "quantised self"),
    ("gemma4, shared", "graph", "Medusa heads"),
    ("minicpm3", "graph", "Medusa heads"),
]


@cache
def model_of(family):
    return build(family)


@cache
def texts(family):
    """A ragged batch of 3, and what transformers makes of it."""
    ids, mask = ragged_prompts(3)
    return ids, mask, model_of(family).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)


@pytest.mark.parametrize(("family", "mode", "drafter"), CASES)
def test_greedy_equals_transformers(family, mode, drafter):
    if mode == "compile" and why_unavailable():
        pytest.skip("no C compiler")
    ids, mask, expected = texts(family)
    runner = specdec.ModelRunner(model_of(family), mode=mode, page_size=PAGE)
    out = specdec.SpeculativeGenerator(runner, DRAFTERS[drafter](runner, family)).generate(
        ids, mask, max_new_tokens=NEW
    )
    assert out.sequences.equal(expected)
    assert mode == "eager" or out.stats.host is None
    assert runner.cache.free_pages == runner.cache.num_pages


def test_a_drafter_in_the_targets_cache_keeps_what_the_target_keeps():
    """A hook that came between keeps the drafter's layer from latents."""
    model = build("deepseek_v3")
    target = specdec.ModelRunner(model, mode="eager")
    model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *given: None)
    with pytest.warns(UserWarning, match="keeps the keys and values of all heads"):
        drafter = specdec.EarlyExitDrafter(model, 1)
    assert "(1 layers: its kv_b_proj has hooks" in drafter.runner.explain()
    with pytest.raises(ValueError, match=r"keep \[KeyValueLayer.* target's \[LatentLayer.* make the drafter anew"):
        specdec.SpeculativeGenerator(target, drafter)


def test_layers_with_inputs_of_one_projection_cannot_leave_early():
    with pytest.raises(UnsupportedArchitecture, match="cut to 1 layers: one projection .*hidden_size_per_layer_input"):
        specdec.EarlyExitDrafter(model_of("gemma4, shared"), 1)


@pytest.mark.parametrize(
    ("family", "mode"), [("gemma4, shared", "graph"), ("mimo_v2_flash", "eager"), ("deepseek_v3", "graph")]
)
def test_an_engine_shares_prefixes_and_forks(family, mode):
    """Requests that begin alike, one that goes on from another's text, and memory that is exactly that of the pages."""
    runner = specdec.ModelRunner(model_of(family), mode=mode, page_size=PAGE)
    drafter = specdec.ModelDrafter(noisy_copy(family), 3)
    drafter.runner.page_size = PAGE
    memory = 60 * sum(one.page_format.bytes for one in (runner, drafter.runner))
    engine = specdec.Engine(runner, drafter, memory=memory, max_tokens_per_step=32, tree=None)
    for own in engine._memory.caches:
        held = [x.untyped_storage() for part in own.parts for x in (part.key_pages, part.value_pages)]
        bytes_of = {storage.data_ptr(): storage.nbytes() for storage in held}
        assert own.num_pages == 60 and 60 * own.stats().bytes_per_page == sum(bytes_of.values())
    base = texts(family)[0][0].tolist()
    prompts = [base, base[:13] + [5, 6], base[:9] + [7]]
    first = engine.submit(prompts[0], max_new_tokens=NEW)
    while len(first.tokens) < 3:
        engine.step()
    (fork,) = engine.fork(first)
    others = [engine.submit(prompt, max_new_tokens=NEW) for prompt in prompts[1:]]
    list(engine.run())
    assert engine.stats()["saved_tokens"] >= 12 + 8 + len(base) // PAGE * PAGE
    assert fork.prompt[len(base) :] + fork.tokens == first.tokens
    for handle, prompt in zip([first, *others], prompts, strict=True):
        ids = torch.tensor([prompt])
        alone = runner.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        assert handle.tokens == alone[0, len(prompt) :].tolist()
    for own in engine._memory.caches:
        own.table.check_integrity()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_8_bit_pages_of_every_layer(kv_dtype):
    """Speculative text over them is that of plain decoding over them, and they take a quarter of the memory or so."""
    family, (ids, mask, _) = "gemma4, shared", texts("gemma4, shared")
    plain = specdec.AutoregressiveGenerator(model_of(family), kv_dtype=kv_dtype)
    drafter = specdec.ModelDrafter(noisy_copy(family), 3)
    chain = specdec.SpeculativeGenerator(model_of(family), drafter, kv_dtype=kv_dtype)
    one, other = (generator.generate(ids, mask, max_new_tokens=8).sequences for generator in (plain, chain))
    assert one.equal(other)
    whole = specdec.ModelRunner(model_of(family)).page_format.bytes
    assert whole / 4 < plain.target.page_format.bytes < whole / 3


def test_8_bit_pages_are_refused_for_latents():
    with pytest.raises(ValueError, match="kv_dtype='int8' is not for layers that keep latents"):
        specdec.ModelRunner(model_of("deepseek_v3"), kv_dtype="int8")
