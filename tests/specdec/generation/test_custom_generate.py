"""`model.generate(custom_generate=…)`."""

import gc
import inspect
import weakref

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList, StaticCache

import specdec
from specdec.requests.inputs import require_unchanged_text
from tests.families import build, noisy_copy, ragged_prompts
from tests.specdec.generation.test_generators import EvenAfterEven, Recorder

pytestmark = pytest.mark.seam


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.6},
        {"logits_processor": LogitsProcessorList([EvenAfterEven()])},
        {"min_new_tokens": 6},
    ],
    ids=" ".join,
)
def test_greedy_equals_plain_generate(options):
    ids, _ = ragged_prompts(1)
    model = build("qwen3")
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("qwen3"), 3))
    arguments = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=15, **options)
    assert model.generate(ids, custom_generate=adapter, **arguments).equal(model.generate(ids, **arguments))
    assert adapter.stats.pooled.tokens_per_round > 1


def test_ragged_batch_and_dictionary_output():
    ids, mask = ragged_prompts(4)
    model = build("llama")
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=11,
        custom_generate=adapter,
        return_dict_in_generate=True,
    )
    assert out.sequences.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=11))


def test_seed_and_streamer_go_through_the_factory():
    ids, _ = ragged_prompts(1)
    model, streamer = build("llama"), Recorder()
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3), streamer=streamer, seed=3)
    arguments = dict(attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=9, custom_generate=adapter)
    first = model.generate(ids, **arguments)
    assert model.generate(ids, **arguments).equal(first)
    assert streamer.ended


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_what_has_no_meaning_here_is_refused():
    ids, _ = ragged_prompts(1)
    model = build("llama")
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
    arguments = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, custom_generate=adapter)
    for name in ("past_key_values", "cache"):  # what this release calls it and what another does
        with pytest.raises(ValueError, match=r"(past_key_values|cache) with 3 tokens cannot be used"):
            model.generate(ids, **{name: filled(model, ids[:, :3])}, **arguments)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **arguments)


def filled(model, ids):
    """A cache that holds `ids`, under whatever name this release gives it back."""
    out = model(ids, use_cache=True)
    return getattr(out, "cache", None) or out.past_key_values


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_what_is_empty_is_never_refused_whatever_its_name():
    """Empty caches, containers and tensors, flags, counts, zeros a token; the text is that of a call without them."""
    ids, mask = ragged_prompts(2)
    model = build("llama")
    static = StaticCache(model.config, max_cache_len=40)
    real = mask != 0
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    nothing = [
        None,
        {},
        [],
        (),
        "",
        DynamicCache(),
        static,
        torch.zeros(2, 0),
        True,
        False,
        1,
        torch.zeros_like(ids),
        counted,
    ]
    for given in nothing:
        require_unchanged_text("a_name_of_tomorrow", given, real)
    static.update(
        torch.ones(2, 2, 3, 8),
        torch.ones(2, 2, 3, 8),
        0,
        *([{"cache_position": torch.arange(3)}] if takes_positions(static) else []),
    )
    tokens = static.get_seq_length()
    pairs = tuple((torch.zeros(2, 2, 5, 8),) * 2 for _ in range(3))
    for given, words in (
        (static, f"with {int(tokens)} tokens"),
        (pairs, "with 5 tokens"),
        (torch.ones(2, 3), r"a tensor \[2, 3\]"),
        (0.5, "got 0.5"),
        ("french", "got 'french'"),
        (torch.ones_like(ids), r"a tensor \[2, 21\]"),
        (filled(model, ids), "with 21 tokens"),
    ):
        with pytest.raises(ValueError, match=f"a_name_of_tomorrow .*{words}"):
            require_unchanged_text("a_name_of_tomorrow", given, real)
    adapter = specdec.custom_generate(specdec.PromptLookupDrafter())
    arguments = dict(attention_mask=mask, do_sample=False, max_new_tokens=5)
    want = model.generate(ids, **arguments)
    for name in ("past_key_values", "cache"):
        assert model.generate(
            ids, custom_generate=adapter, **{name: DynamicCache(config=model.config)}, **arguments
        ).equal(want)
        assert model.generate(ids, custom_generate=adapter, **{name: None}, **arguments).equal(want)


def takes_positions(cache) -> bool:
    return "cache_position" in inspect.getsource(type(cache.layers[0]).update)


def test_inputs_that_would_change_the_text_are_refused():
    ids, mask = ragged_prompts(2)
    model = build("llama")
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
    arguments = dict(attention_mask=mask, do_sample=False, max_new_tokens=5, custom_generate=adapter)
    with pytest.raises(ValueError, match="inputs_embeds cannot be used"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **arguments)
    with pytest.raises(ValueError, match="position_ids cannot be used unless they count from 0"):
        model.generate(ids, position_ids=torch.arange(ids.shape[1])[None] * 3, **arguments)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert model.generate(ids, position_ids=counted, **arguments).equal(model.generate(ids, **arguments))
    require_unchanged_text("position_ids", counted.expand(3, -1, -1), mask != 0)  # as models of text and images count
    with pytest.raises(ValueError, match="position_ids cannot be used"):
        require_unchanged_text("position_ids", torch.stack([counted, 2 * counted]), mask != 0)


def test_a_seed_in_generate_goes_first():
    ids, _ = ragged_prompts(1)
    model = build("llama")
    text = lambda of_factory, **seed: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=12,
        custom_generate=specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3), seed=of_factory),
        **seed,
    ).tolist()
    assert text(3) == text(4, seed=3) != text(4)


def test_the_adapter_keeps_no_model_but_the_last():
    ids, _ = ragged_prompts(1)
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
    for name in ("llama", "llama"):
        model = build(name)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, custom_generate=adapter
        )
        seen = weakref.ref(model)
    other = build("llama", seed=1)
    other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, custom_generate=adapter)
    del model
    gc.collect()
    assert seen() is None
