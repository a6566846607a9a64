"""`model.generate(custom_generate=…)`."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

import specdec
from scripts.generate_methods import cache_argument
from specdec.hf import _refuse_inputs
from tests.families import build, ragged_prompts
from tests.specdec.test_generators import EvenAfterEven, Recorder, noisy_copy

pytestmark = pytest.mark.seam


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.6}, {"logits_processor": LogitsProcessorList([EvenAfterEven()])}, {"min_new_tokens": 6}], ids=" ".join
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
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=11, custom_generate=adapter, return_dict_in_generate=True)
    assert out.sequences.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=11))


def test_seed_and_streamer_go_through_the_factory():
    ids, _ = ragged_prompts(1)
    model, streamer = build("llama"), Recorder()
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3), streamer=streamer, seed=3)
    arguments = dict(attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=9, custom_generate=adapter)
    first = model.generate(ids, **arguments)
    assert model.generate(ids, **arguments).equal(first)
    assert streamer.ended


def test_what_has_no_meaning_here_is_refused():
    ids, _ = ragged_prompts(1)
    model = build("llama")
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
    arguments = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, custom_generate=adapter)
    past = DynamicCache()
    name = cache_argument(model)
    model(ids[:, :3], **{name: past})
    with pytest.raises(ValueError, match="(cache|past_key_values) with 3 tokens"):
        model.generate(ids, **{name: past}, **arguments)
    with pytest.raises(ValueError, match="output_scores=True"):
        model.generate(ids, output_scores=True, return_dict_in_generate=True, **arguments)


def test_inputs_that_would_change_the_text_are_refused():
    ids, mask = ragged_prompts(2)
    model = build("llama")
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
    arguments = dict(attention_mask=mask, do_sample=False, max_new_tokens=5, custom_generate=adapter)
    with pytest.raises(ValueError, match="inputs_embeds cannot be used"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **arguments)
    with pytest.raises(ValueError, match="position_ids cannot be used with custom_generate unless they count from 0"):
        model.generate(ids, position_ids=torch.arange(ids.shape[1])[None] * 3, **arguments)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert model.generate(ids, position_ids=counted, **arguments).equal(model.generate(ids, **arguments))
    _refuse_inputs({"position_ids": counted.expand(3, -1, -1)}, mask != 0)  # as models of text and images count
    with pytest.raises(ValueError, match="position_ids cannot be used"):
        _refuse_inputs({"position_ids": torch.stack([counted, 2 * counted])}, mask != 0)


def test_a_seed_in_generate_goes_first():
    ids, _ = ragged_prompts(1)
    model = build("llama")
    text = lambda of_factory, **seed: model.generate(  # noqa: E731
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=12,
        custom_generate=specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3), seed=of_factory), **seed).tolist()  # fmt: skip
    assert text(3) == text(4, seed=3) != text(4)


def test_the_adapter_keeps_no_model_but_the_last():
    ids, _ = ragged_prompts(1)
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
    for name in ("llama", "llama"):
        model = build(name)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, custom_generate=adapter)
        seen = weakref.ref(model)
    other = build("llama", seed=1)
    other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, custom_generate=adapter)
    del model
    gc.collect()
    assert seen() is None
