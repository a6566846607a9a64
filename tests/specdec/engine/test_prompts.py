"""Prompts as text and chats, generation configs, and what a request may not ask for."""

import pytest
import torch
from transformers import GenerationConfig

import specdec
from tests.families import build
from tests.matrix import word_tokenizer, words
from tests.specdec.engine.test_engine import engine_of, model_of, require_empty, solo

TEMPLATE = (
    "{% for m in messages %}{{ 'w90 ' if m['role'] == 'user' else 'w91 ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w92{% endif %}"
)


def engine_with_tokenizer(template=None):
    tokenizer = word_tokenizer(words(97))
    tokenizer.chat_template = template
    return engine_of("chain", tokenizer=tokenizer)


def test_a_chat_goes_through_the_template():
    engine = engine_with_tokenizer(TEMPLATE)
    chat = [{"role": "user", "content": "w11 w12"}, {"role": "assistant", "content": "w13"}]
    handles = [engine.submit(given, max_new_tokens=6) for given in (chat, tuple(chat), "w90 w11 w12 w91 w13 w92")]
    assert len(list(engine.run())) == 3
    assert [handle.prompt for handle in handles] == [[90, 11, 12, 91, 13, 92]] * 3
    assert {tuple(handle.tokens) for handle in handles} == {tuple(solo("chain", handles[0].prompt, {}))[:6]}


def test_what_is_no_chat_is_refused_by_a_sentence():
    chat = [{"role": "user", "content": "w11"}]
    with pytest.raises(ValueError, match="a chat needs Engine\\(tokenizer"):
        engine_of().submit(chat)
    with pytest.raises(ValueError, match="has no chat template"):
        engine_with_tokenizer().submit(chat)
    engine = engine_with_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="does not take these messages: roles must alternate"):
        engine.submit(chat)
    for broken in ([*chat, "w12"], [{"content": "w11"}]):
        with pytest.raises(ValueError, match="messages of a chat are"):
            engine.submit(broken)
    for empty in ([], "", torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="prompt"):
            engine.submit(empty)
    require_empty(engine)


@pytest.mark.parametrize("name", ["adapter", "adapter_name", "lora", "lora_request"])
def test_lora_per_request_is_refused_by_name(name):
    engine = engine_of()
    with pytest.raises(TypeError, match=f"{name}='mine': LoRA per request is not supported: all requests run with"):
        engine.submit([11], **{name: "mine"})
    with pytest.raises(TypeError, match="LoRA per request is not supported"):
        engine.submit([11], **{name: torch.zeros(2)})
    require_empty(engine)


def test_numbers_of_the_whole_vocabulary_are_refused():
    engine = engine_of()
    with pytest.raises(ValueError, match="output_scores and output_logits would keep .* see logprobs=True"):
        engine.submit([11], GenerationConfig(output_scores=True, output_logits=True))


def test_a_generation_config_counts_and_options_come_before_it():
    engine, prompt = engine_with_tokenizer(), [11, 12, 13]
    config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[5, 6, 7, 8], max_new_tokens=30)
    alike = engine.submit(prompt, config, 3)
    other = engine.submit(prompt, generation_config=config, seed=3, temperature=1.9)
    list(engine.run())
    wanted = dict(generation_config=config, seed=3)
    assert alike.tokens == solo("chain", prompt, {"max_new_tokens": None} | wanted)
    assert other.tokens == solo("chain", prompt, {"max_new_tokens": None, "temperature": 1.9} | wanted) != alike.tokens


def test_stop_strings_are_read_with_the_engines_tokenizer():
    pair = specdec.load_tiny_pair()
    engine = specdec.Engine(pair.target, specdec.ModelDrafter(pair.draft, 4), memory=1 << 22, tokenizer=pair.tokenizer)
    plain = engine.submit("def add(a, b):", max_new_tokens=40)
    list(engine.run())
    stop = plain.text[30:36]
    config = GenerationConfig(stop_strings=[stop, "no such text"], max_new_tokens=40)
    stopped = engine.submit("def add(a, b):", config)
    list(engine.run())
    assert stopped.reason == "stop" and stop in stopped.text and len(stopped.tokens) < 40
    ids = pair.tokenizer("def add(a, b):", return_tensors="pt").input_ids
    out = specdec.AutoregressiveGenerator(pair.target).generate(ids, generation_config=config, tokenizer=pair.tokenizer)
    assert out.sequences[0, ids.shape[1] :].tolist() == stopped.tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.5), ("temperature", float("nan")), ("top_p", 1.5), ("top_p", -0.1), ("top_k", -1),
     ("min_p", 2.0), ("repetition_penalty", 0.0), ("max_new_tokens", 0), ("max_new_tokens", -3)],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name_and_the_engine_goes_on(name, value):
    engine = engine_of()
    good = engine.submit([11, 12, 13], max_new_tokens=5)
    engine.step()
    with pytest.raises(ValueError, match=name.removeprefix("repetition_")):
        engine.submit([11], **{"do_sample": True} | {name: value})
    assert list(engine.run()) == [good] and good.tokens == solo("chain", [11, 12, 13], {"max_new_tokens": 5})
    require_empty(engine)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["memory", "max_tokens_per_step", "max_rows"])
def test_budgets_of_zero_and_below_are_refused(name, value):
    with pytest.raises(ValueError, match=f"got .*{value}"):
        specdec.Engine(model_of(), **{"memory": 1 << 20} | {name: value})


def test_drafters_for_another_target_are_refused():
    other = build("llama")
    with pytest.raises(ValueError, match="not the generator's target"):
        specdec.Engine(model_of(), specdec.EarlyExitDrafter(other, 1))
    other.resize_token_embeddings(41)
    with pytest.raises(ValueError, match="97"):
        specdec.Engine(model_of(), specdec.ModelDrafter(other, 3))
