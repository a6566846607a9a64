"""Keywords of transformers' `generate`, and scores and logits of every new token: all as transformers has them."""

import pytest
import torch
from transformers import GenerationConfig, PrefixConstrainedLogitsProcessor

import specdec
from specdec.tiny_pair import load_tiny_pair
from tests.families import VOCAB, build, noisy_copy, ragged_prompts
from tests.specdec.generation.test_options import PAD

pytestmark = pytest.mark.seam
MODEL = build("llama")
IDS, MASK = ragged_prompts(3)
IDS = torch.where(MASK == 1, IDS, PAD)
CALL = dict(attention_mask=MASK, do_sample=False, max_new_tokens=12, pad_token_id=PAD)
SAID = MODEL.generate(IDS, **CALL, eos_token_id=None)[:, IDS.shape[1] :].tolist()
GENERATORS = {
    "plain": specdec.AutoregressiveGenerator(MODEL),
    "chain": specdec.SpeculativeGenerator(MODEL, specdec.ModelDrafter(noisy_copy("llama"), 3)),
    "tree": specdec.SpeculativeGenerator(
        MODEL, specdec.ModelDrafter(noisy_copy("llama"), tree=specdec.TokenTree.from_widths((2, 2)))
    ),
    "dynamic": specdec.SpeculativeGenerator(MODEL, specdec.DynamicTreeDrafter(noisy_copy("llama"), 6)),
}
KEYWORDS = {
    "one end token": dict(eos_token_id=SAID[0][4]),
    "two end tokens": dict(eos_token_id=[SAID[0][4], SAID[1][2]]),
    "no end token": dict(eos_token_id=None),
    "penalty": dict(repetition_penalty=1.6),
    "least length": dict(eos_token_id=SAID[0][1], min_new_tokens=6),
    "max_length": dict(max_new_tokens=None, max_length=IDS.shape[1] + 7),
    "n-grams": dict(no_repeat_ngram_size=2),
    "forbidden": dict(suppress_tokens=SAID[0][:3]),
    "allowed": dict(prefix_allowed_tokens_fn=lambda row, text: [5 + row, 30 + len(text) % 20, 60]),
    "transformers' cache": dict(cache_implementation="dynamic", use_cache=True),
}


@pytest.mark.parametrize("method", GENERATORS)
@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_mean_what_they_mean_to_transformers(name, method):
    """The text, and the scores and logits of every new token until a row ends."""
    call = CALL | KEYWORDS[name] | dict(output_scores=True, output_logits=True)
    theirs = MODEL.generate(IDS, **call, return_dict_in_generate=True)
    out = GENERATORS[method].generate(IDS, **call)
    assert out.sequences.equal(theirs.sequences)
    compared = [token for token in range(VOCAB) if name != "penalty" or token != PAD]  # 5.17 counts padding as repeated
    for mine, their in ((out.scores, theirs.scores), (out.logits, theirs.logits)):
        assert len(mine) == len(their) == int(out.lengths.max())
        for place, (a, b) in enumerate(zip(mine, their, strict=True)):
            live = out.lengths > place
            torch.testing.assert_close(a[live][:, compared], b[live][:, compared], rtol=1e-4, atol=1e-4)
            assert a.dtype == torch.float32 and not a[~live].any()


def test_without_being_asked_for_nothing_is_kept():
    out = GENERATORS["chain"].generate(IDS, **CALL, output_scores=True)
    assert out.logits is None and len(out.scores) == 12
    out = GENERATORS["chain"].generate(IDS, **CALL)
    assert out.scores is None and out.logits is None


def test_sampled_tokens_come_from_the_scores_that_are_returned():
    """Scores are after the warpers: a token that was drawn is among the top three of its scores, and of its logits."""
    call = CALL | dict(do_sample=True, top_k=3, temperature=0.7, seed=5, output_scores=True, output_logits=True)
    out = GENERATORS["tree"].generate(IDS, **call)
    new = out.sequences[:, IDS.shape[1] :]
    for place, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        live = out.lengths > place
        assert (scores.isfinite().sum(1) == 3)[live].all()
        chosen = new[live, place, None]
        assert scores[live].gather(1, chosen).isfinite().all()
        torch.testing.assert_close(scores[live].gather(1, chosen), logits[live].gather(1, chosen) / 0.7)


def test_several_texts_of_a_prompt_are_rows_of_their_own():
    """The rows of a prompt follow each other, differ, and are what a batch of copies gives."""
    call = CALL | dict(do_sample=True, seed=3)
    out = GENERATORS["chain"].generate(IDS, **call, num_return_sequences=4)
    copies = GENERATORS["chain"].generate(IDS.repeat_interleave(4, 0), **call | dict(
        attention_mask=MASK.repeat_interleave(4, 0)))  # fmt: skip
    assert out.sequences.equal(copies.sequences) and len(out.stats.rows) == 12
    assert len({tuple(row) for row in out.sequences[:4].tolist()}) > 1
    config = GenerationConfig(do_sample=True, num_return_sequences=4, max_new_tokens=12, pad_token_id=PAD)
    torch.manual_seed(0)
    assert GENERATORS["chain"].generate(IDS, MASK, generation_config=config).sequences.shape[0] == 12
    adapter = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3), seed=3)
    inside = MODEL.generate(IDS, **CALL | dict(do_sample=True), num_return_sequences=4, custom_generate=adapter)
    assert inside.shape[0] == 12


def test_allowed_tokens_of_several_texts_are_those_of_their_prompt():
    allowed = lambda prompt, text: [5 + prompt, 50 + prompt]
    call = CALL | dict(do_sample=True, seed=3, num_return_sequences=3, eos_token_id=None)
    out = GENERATORS["chain"].generate(IDS, **call, prefix_allowed_tokens_fn=allowed)
    for row, text in enumerate(out.sequences[:, IDS.shape[1] :].tolist()):
        assert set(text) <= {5 + row // 3, 50 + row // 3}
    by_hand = GENERATORS["chain"].generate(IDS, **call, logits_processor=[PrefixConstrainedLogitsProcessor(allowed, 3)])
    assert out.sequences.equal(by_hand.sequences)


def test_keywords_come_before_the_config_and_the_config_before_the_model():
    config = GenerationConfig(max_new_tokens=9, eos_token_id=SAID[0][1], pad_token_id=PAD)
    generator = GENERATORS["plain"]
    assert generator.generate(IDS[:1], MASK[:1], generation_config=config).lengths.tolist() == [
        SAID[0].index(SAID[0][1]) + 1
    ]
    out = generator.generate(IDS[:1], MASK[:1], generation_config=config, eos_token_id=None)
    assert out.lengths.tolist() == [9]
    out = generator.generate(
        IDS[:1], MASK[:1], generation_config=config, eos_token_id=None, max_length=IDS.shape[1] + 4
    )
    assert out.lengths.tolist() == [4]


def test_stop_strings_end_the_text_where_transformers_ends_it():
    pair = load_tiny_pair()
    ids = pair.tokenizer("def mean(values):\n", return_tensors="pt").input_ids
    call = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
    text = pair.tokenizer.decode(pair.target.generate(ids, **call)[0, ids.shape[1] :])
    stop = text[20:23]
    theirs = pair.target.generate(ids, **call, stop_strings=stop, tokenizer=pair.tokenizer)
    generator = specdec.SpeculativeGenerator(pair.target, specdec.ModelDrafter(pair.draft, 4))
    for strings in (stop, [stop, "never said"]):
        out = generator.generate(ids, **call, stop_strings=strings, tokenizer=pair.tokenizer)
        assert out.sequences.equal(theirs)
    assert 0 < int(out.lengths[0]) < 60


def test_token_types_of_zero_come_along_unnoticed():
    """As some tokenizers give them; `**inputs` is how most people call."""
    inputs = dict(input_ids=IDS, attention_mask=MASK, token_type_ids=torch.zeros_like(IDS), position_ids=None)
    out = GENERATORS["chain"].generate(**inputs, max_new_tokens=12, eos_token_id=None, pad_token_id=PAD)
    assert out.sequences[:, IDS.shape[1] :].tolist() == SAID
    assert int(out.sequences.max()) < VOCAB
