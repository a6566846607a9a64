"""Bad input: each a clear error that names the value, and no page stays taken."""

import re

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import LogitsProcessor

import attention
import specdec
from tests.families import PROBED, REFUSED, build, noisy_copy, ragged_prompts

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
GENERATOR = specdec.SpeculativeGenerator(build("llama"), specdec.ModelDrafter(noisy_copy("llama"), 3))


class EvenAfterNothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return None


BAD_CALLS = {
    "empty prompt": (dict(input_ids=torch.zeros(1, 0, dtype=torch.int64)), "[1, 0]"),
    "a row of padding only": (
        dict(input_ids=IDS, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])),
        "row 1 is an empty prompt",
    ),
    "padding on the right": (
        dict(input_ids=IDS, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])),
        "row 1 is [1, 1, 0]",
    ),
    "mask of another shape": (dict(input_ids=IDS, attention_mask=torch.ones(2, 4)), "[2, 4]"),
    "one dimension": (dict(input_ids=IDS[0]), "[3]"),
    "floats": (dict(input_ids=IDS.float()), "float32"),
    "a list": (dict(input_ids=[[1, 2]]), "list"),
    "token beyond the vocabulary": (
        dict(input_ids=torch.tensor([[5, 97]])),
        "token id 97, outside the vocabulary of 97",
    ),
    "negative token": (dict(input_ids=torch.tensor([[-2, 5]])), "token id -2"),
    "beyond the positions": (
        dict(input_ids=IDS, max_new_tokens=158),
        "prompt of 3 tokens + max_new_tokens 158 exceed the model's 160 positions",
    ),
    "no new tokens": (dict(input_ids=IDS, max_new_tokens=0), "got 0"),
    "temperature zero": (dict(input_ids=IDS, do_sample=True, temperature=0.0), "got 0.0"),
    "temperature below zero": (dict(input_ids=IDS, do_sample=True, temperature=-0.5), "got -0.5"),
    "top_k below zero": (dict(input_ids=IDS, do_sample=True, top_k=-1), "got -1"),
    "top_p above one": (dict(input_ids=IDS, do_sample=True, top_p=1.5), "got 1.5"),
    "beams": (dict(input_ids=IDS, generation_config=GenerationConfig(num_beams=4)), "num_beams=4"),
    "several greedy texts": (dict(input_ids=IDS, num_return_sequences=3), "num_return_sequences=3 needs do_sample"),
    "a misspelt option": (dict(input_ids=IDS, max_tokens=5), "no option max_tokens=5: is it max_"),
    "an unknown option": (dict(input_ids=IDS, qqqqqq=5), "no option qqqqqq=5: see GenerationConfig"),
    "an assistant": (dict(input_ids=IDS, assistant_model=5), "ModelDrafter(assistant_model)"),
    "embeddings": (dict(input_ids=IDS, inputs_embeds=torch.ones(2, 3, 32)), "inputs_embeds cannot be used"),
    "token types": (dict(input_ids=IDS, token_type_ids=torch.tensor([[0, 1, 1]] * 2)), "token_type_ids cannot be used"),
    "all of a tokenizer's output": (dict(input_ids={"input_ids": IDS}), "generate(**inputs)"),
    "an end token as text": (dict(input_ids=IDS, eos_token_id="</s>"), "eos_token_id must be a token id"),
    "a tokenizer's name": (dict(input_ids=IDS, stop_strings="end", tokenizer="gpt2"), "tokenizer must be a tokenizer"),
    "half a copy": (dict(input_ids=IDS, num_return_sequences=0), "num_return_sequences must be an integer of at least"),
    "stop strings": (
        dict(input_ids=IDS, generation_config=GenerationConfig(stop_strings=["end"])),
        "stop_strings=['end']",
    ),
    "max_length behind the prompt": (
        dict(input_ids=IDS, generation_config=GenerationConfig(max_length=3)),
        "max_length=3",
    ),
    "new tokens as text": (dict(input_ids=IDS, max_new_tokens="5"), "got '5'"),
    "new tokens yes": (dict(input_ids=IDS, max_new_tokens=True), "got True"),
    "a mask as a list": (dict(input_ids=IDS, attention_mask=[[1, 1, 1]] * 2), "attention_mask must be a tensor"),
    "sampling by word": (dict(input_ids=IDS, do_sample="no"), "do_sample must be True or False or None, got 'no'"),
    "temperature by word": (
        dict(input_ids=IDS, do_sample=True, temperature="hot"),
        "temperature must be a number or None, got 'hot'",
    ),
    "temperature without end": (dict(input_ids=IDS, do_sample=True, temperature=float("inf")), "got inf"),
    "half a seed": (dict(input_ids=IDS, seed=1.5), "seed must be an integer or None, got 1.5"),
    "a config as a dictionary": (
        dict(input_ids=IDS, generation_config={"do_sample": True}),
        "generation_config must be a GenerationConfig",
    ),
    "a processor alone": (
        dict(input_ids=IDS, logits_processor=lambda ids, scores: scores),
        "logits_processor must be a list",
    ),
    "a criterion alone": (
        dict(input_ids=IDS, stopping_criteria=lambda ids, scores: True),
        "stopping_criteria must be a list",
    ),
    "a processor that narrows": (
        dict(input_ids=IDS, logits_processor=[lambda ids, scores: scores[:, :10]]),
        "[1, 97], got [1, 10]",
    ),
    "a processor that says nothing": (
        dict(input_ids=IDS, logits_processor=[EvenAfterNothing()]),
        "EvenAfterNothing must return scores",
    ),
    "a criterion that says nothing": (
        dict(input_ids=IDS, stopping_criteria=[lambda ids, scores: None]),
        "must return booleans, got None",
    ),
    "no streamer": (dict(input_ids=IDS, streamer=5), "put and end, as transformers' have, got 5"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_value(name):
    arguments, message = BAD_CALLS[name]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        GENERATOR.generate(**arguments)
    for runner in (GENERATOR.target, GENERATOR.drafter.runner):
        assert runner._own.held is None or runner.cache.free_pages == runner.cache.num_pages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: specdec.SpeculativeGenerator(model, model),
            "drafter must be a Drafter, such as specdec.ModelDrafter(model), got 'LlamaForCausalLM'",
        ),
        (lambda model: specdec.SpeculativeGenerator(model, specdec.ModelDrafter), "drafter must be a Drafter"),
        (
            lambda model: specdec.SpeculativeGenerator("folder", None),
            "a transformers model is wanted (specdec.load_model reads one",
        ),
        (lambda model: specdec.ModelDrafter("folder"), "got 'folder'"),
        (lambda model: specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter(), rule="block"), "got 'block'"),
        (
            lambda model: specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter(), rule=specdec.Typical),
            "or Typical(), got",
        ),
        (
            lambda model: specdec.SpeculativeGenerator(model, specdec.ModelDrafter(model, 1024)),
            "a draft may have 1023 tokens, got a drafter of 1024",
        ),
        (lambda model: specdec.custom_generate(None), "got None"),
    ],
)
def test_what_is_no_model_drafter_or_rule_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make(build("llama"))


def test_another_vocabulary_is_refused():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="same vocabulary, apart from padding, got 40 tokens for the draft and 97 for"):
        specdec.SpeculativeGenerator(build("llama"), specdec.ModelDrafter(LlamaForCausalLM(config).eval()))


def test_prompts_on_another_device_are_refused(monkeypatch):
    """There is one device here, so the runner is told that it sits elsewhere."""
    runner = specdec.ModelRunner(build("llama"))
    monkeypatch.setattr(runner, "device", torch.device("meta"))
    with pytest.raises(ValueError, match="input_ids are on cpu, the model on meta"):
        specdec.AutoregressiveGenerator(runner).generate(IDS)


@pytest.mark.parametrize("length", [0, -1])
def test_draft_length_below_one_is_refused(length):
    with pytest.raises(ValueError, match=f"at least 1, got {length}"):
        specdec.ModelDrafter(build("llama"), num_tokens=length)


@pytest.mark.parametrize("family", REFUSED)
def test_architectures_that_cannot_be_paged_are_named(family):
    model = build(family)
    with pytest.raises(
        attention.UnsupportedArchitecture, match=type(model).__name__ + " .* transformers' AttentionInterface"
    ):
        specdec.AutoregressiveGenerator(model)


@pytest.mark.parametrize("family", PROBED)
def test_a_family_that_the_release_decides_about_is_refused_by_name_or_right(family):
    model = build(family)
    ids, mask = ragged_prompts(3)
    try:
        out = specdec.AutoregressiveGenerator(model).generate(ids, mask, max_new_tokens=20)
    except attention.UnsupportedArchitecture as error:
        assert re.match(f"{type(model).__name__} .* transformers' AttentionInterface", str(error))
    else:
        assert out.sequences.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM is in training mode"):
        specdec.ModelRunner(build("llama").train())


def poisoned(name: str):
    model = build(name)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = float("nan")
    return model


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("who", ["target", "draft"])
def test_nan_logits_are_reported_and_nothing_stays_taken(who, do_sample):
    ids, mask = ragged_prompts(3)
    target, draft = (poisoned("llama") if who == name else build("llama") for name in ("target", "draft"))
    generator = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(draft, 3))
    with pytest.raises(ValueError, match=f"the {who} model produced NaN or infinite logits in row 0 after .* tokens"):
        generator.generate(ids, mask, max_new_tokens=9, do_sample=do_sample)
    for runner in (generator.target, generator.drafter.runner):
        assert runner._own.held is None or (
            runner.cache.sequences == () and runner.cache.free_pages == runner.cache.num_pages
        )


@pytest.mark.parametrize("who", ["target", "draft"])
def test_out_of_pages_names_sizes_and_gives_everything_back(who):
    """A fixed cache that is too small for the batch, found in the middle of the call."""
    ids, mask = ragged_prompts(3)
    target, drafter = (
        specdec.ModelRunner(build("llama"), page_size=8, num_pages=9 if who == "target" else None),
        specdec.ModelDrafter(build("llama"), 3),
    )
    if who == "draft":
        drafter.runner = specdec.ModelRunner(build("llama"), page_size=8, num_pages=9)
    generator = specdec.SpeculativeGenerator(target, drafter)
    with pytest.raises(attention.OutOfPages, match=r"pages of 8 tokens are needed .* of 9 are free"):
        generator.generate(ids, mask, max_new_tokens=40)
    for runner in (generator.target, drafter.runner):
        assert runner.cache.sequences == () and runner.cache.free_pages == runner.cache.num_pages
    assert generator.generate(ids[:1], mask[:1], max_new_tokens=3).lengths.tolist() == [3]


def test_config_and_keywords_settle_as_documented():
    """A keyword wins over the config; None leaves it to the config; without one the defaults are greedy and 128
    tokens.
    """
    ids = torch.tensor([[5, 6, 7]])
    model = build("llama")
    model.generation_config.eos_token_id = None
    generator = specdec.AutoregressiveGenerator(model)
    assert generator.generate(ids).lengths.tolist() == [128]
    assert generator.generate(ids, generation_config=GenerationConfig(max_new_tokens=7)).lengths.tolist() == [7]
    assert generator.generate(
        ids, generation_config=GenerationConfig(max_new_tokens=7), max_new_tokens=5
    ).lengths.tolist() == [5]
    assert generator.generate(ids, generation_config=GenerationConfig(max_length=9)).lengths.tolist() == [6]
    greedy = generator.generate(ids, max_new_tokens=9).sequences
    assert generator.generate(
        ids, generation_config=GenerationConfig(do_sample=True), do_sample=False, max_new_tokens=9
    ).sequences.equal(greedy)
    assert generator.generate(
        ids, generation_config=GenerationConfig(do_sample=True, top_k=1), max_new_tokens=9, seed=0
    ).sequences.equal(greedy)


def test_padding_is_inferred_from_the_pad_token_as_in_transformers():
    ids, mask = ragged_prompts(3)
    model = build("llama")
    assert (
        specdec.AutoregressiveGenerator(model)
        .generate(ids, max_new_tokens=6)
        .sequences.equal(model.generate(ids, do_sample=False, max_new_tokens=6))
    )
    assert specdec.AutoregressiveGenerator(model).generate(ids.int(), max_new_tokens=6).sequences.dtype == torch.int64


class BanAll(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, float("-inf"))


@pytest.mark.parametrize(
    "options",
    [dict(temperature=1e-40), dict(logits_processor=[BanAll()])],
    ids=["vanishing temperature", "everything banned"],
)
def test_processors_that_leave_no_score_are_reported(options):
    """Never a made-up token: with a draft and without one."""
    for generator in (GENERATOR, specdec.AutoregressiveGenerator(GENERATOR.target)):
        with pytest.raises(ValueError, match="left the (target|draft) model no finite score in row 0"):
            generator.generate(IDS, max_new_tokens=6, do_sample=True, **options)


def test_a_model_put_into_training_mode_later_is_refused():
    generator = specdec.AutoregressiveGenerator(build("llama"))
    generator.target.model.train()
    with pytest.raises(ValueError, match="training mode"):
        generator.generate(IDS)


def test_the_users_own_length_and_end_criteria_count_as_in_transformers():
    ids, mask = ragged_prompts(2)
    model = build("llama")
    generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(noisy_copy("llama"), 4))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    token = int(generator.generate(ids[:1], mask[:1], max_new_tokens=9).sequences[0, -4])
    for criteria in ([MaxLengthCriteria(ids.shape[1] + 4)], [EosTokenCriteria(token)]):
        arguments = dict(attention_mask=mask[:1], max_new_tokens=20, stopping_criteria=StoppingCriteriaList(criteria))
        expected = model.generate(ids[:1], do_sample=False, **arguments)
        assert expected.shape[1] < ids.shape[1] + 20
        assert generator.generate(ids[:1], **arguments).sequences.equal(expected)
        adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 4))
        assert model.generate(ids[:1], do_sample=False, custom_generate=adapter, **arguments).equal(expected)


def test_without_a_pad_token_the_first_end_token_pads():
    ids, mask = ragged_prompts(3)
    model = build("llama")
    model.generation_config.eos_token_id = None
    text = (
        specdec.AutoregressiveGenerator(model).generate(ids, attention_mask=mask, max_new_tokens=12).sequences[:, 21:]
    )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [96, int(text[0, 3])], None
    model.config.pad_token_id = None
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    assert (
        specdec.AutoregressiveGenerator(model)
        .generate(ids, attention_mask=mask, max_new_tokens=12)
        .sequences.equal(expected)
    )
    assert (expected[0, 21:] == 96).any()


def test_the_cache_can_be_used_by_hand_after_a_generation():
    """Its pages are ordinary tensors, though generate made them in inference mode."""
    generator = specdec.AutoregressiveGenerator(build("llama"))
    generator.generate(IDS, max_new_tokens=20)
    runner = generator.target
    sequence = runner.cache.add()
    runner.forward([sequence], torch.arange(5, 11), [6])
    runner.cache.commit([sequence], [0], [(0, 2, 5)])
    runner.forward([runner.cache.fork(sequence)], torch.tensor([7]), [1])
    assert runner.cache.length(sequence) == 3


def test_overhead_is_there_although_a_row_ended_in_the_first_round():
    ids, mask = ragged_prompts(3)
    model = build("llama")
    model.generation_config.eos_token_id = None
    first = int(
        specdec.AutoregressiveGenerator(model).generate(ids, attention_mask=mask, max_new_tokens=1).sequences[0, -1]
    )
    model.generation_config.eos_token_id = first
    out = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(noisy_copy("llama"), 3)).generate(
        ids, mask, max_new_tokens=12
    )
    assert out.lengths[0] == 1 and out.stats.pooled.overhead > 0
    assert specdec.AutoregressiveGenerator(model).generate(
        ids, attention_mask=mask, max_new_tokens=12
    ).stats.pooled.overhead == pytest.approx(1)
