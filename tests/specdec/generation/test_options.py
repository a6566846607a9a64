"""Every option of a generation config that makes a processor or a criterion, on a ragged batch and beside the user's
own: the text is transformers'.
"""

import inspect
import re
from functools import cache

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as lp

import specdec
from specdec.requests.options import UNSUPPORTED
from specdec.requests.request import build_request
from tests.families import VOCAB, build, noisy_copy, ragged_prompts

MODEL = build("llama")
IDS, MASK = ragged_prompts(4)
with (
    torch.no_grad()
):  # a token that is never said: transformers 5.17 counts the padding as repeated, 5.24 and what is built here do not
    PAD = int(MODEL(IDS, attention_mask=MASK).logits[MASK == 1].mean(0).argmin())
IDS = torch.where(MASK == 1, IDS, PAD)
WIDTH, NEW = IDS.shape[1], 14
PLAIN = MODEL.generate(IDS, attention_mask=MASK, do_sample=False, max_new_tokens=NEW, eos_token_id=None)[
    :, WIDTH:
].tolist()
ENDS = [PLAIN[0][4], PLAIN[2][6]]  # what some rows say in the middle
SAID, SECOND = PLAIN[0][2], PLAIN[1][1]
EOS = torch.tensor(ENDS)
ADAPTER = specdec.custom_generate(specdec.ModelDrafter(noisy_copy("llama"), 3))
GENERATOR = specdec.SpeculativeGenerator(
    MODEL, specdec.ModelDrafter(noisy_copy("llama"), tree=specdec.TokenTree.from_widths((2, 2)))
)


@cache
def text_without_options():
    settings = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=ENDS, pad_token_id=PAD)
    return MODEL.generate(IDS, attention_mask=MASK, **settings)


GREEDY = {  # option: (its value, a user's processor of the type that it makes)
    "repetition_penalty": (1.8, lambda: lp.RepetitionPenaltyLogitsProcessor(1.3)),
    "no_repeat_ngram_size": (2, lambda: lp.NoRepeatNGramLogitsProcessor(1)),
    "bad_words_ids": ([[SAID], [SECOND, PLAIN[1][2]]], lambda: lp.NoBadWordsLogitsProcessor([[SECOND]], EOS)),
    "min_length": (WIDTH + 9, lambda: lp.MinLengthLogitsProcessor(WIDTH + 6, EOS)),
    "min_new_tokens": (9, lambda: lp.MinNewTokensLengthLogitsProcessor(WIDTH, 6, EOS)),
    "forced_bos_token_id": (11, lambda: lp.ForcedBOSTokenLogitsProcessor(12)),
    "forced_eos_token_id": (ENDS[0], lambda: lp.ForcedEOSTokenLogitsProcessor(WIDTH + 5, ENDS[1])),
    "remove_invalid_values": (True, lambda: lp.InfNanRemoveLogitsProcessor()),
    "exponential_decay_length_penalty": ((3, 1.8), lambda: lp.ExponentialDecayLengthPenalty((2, 1.5), ENDS, WIDTH)),
    "suppress_tokens": ([SAID, SECOND], lambda: lp.SuppressTokensLogitsProcessor([SECOND])),
    "begin_suppress_tokens": (
        [row[0] for row in PLAIN],
        lambda: lp.SuppressTokensAtBeginLogitsProcessor([SAID, SECOND], WIDTH + 2),
    ),
    "sequence_bias": (
        [[[SAID], -30.0], [[SECOND, 50], 30.0]],
        lambda: lp.SequenceBiasLogitsProcessor([[[SECOND], -30.0]]),
    ),
    "renormalize_logits": (True, lambda: lp.LogitNormalization()),
}
SAMPLING = {  # behind top_k=1, which leaves one token
    "temperature": (0.7, lambda: lp.TemperatureLogitsWarper(1.3)),
    "top_h": (0.5, lambda: lp.TopHLogitsWarper(0.4)),
    "top_k": (1, lambda: lp.TopKLogitsWarper(3)),
    "top_p": (0.8, lambda: lp.TopPLogitsWarper(0.6)),
    "min_p": (0.1, lambda: lp.MinPLogitsWarper(0.3)),
    "typical_p": (0.9, lambda: lp.TopKLogitsWarper(2)),
    "epsilon_cutoff": (0.01, lambda: lp.EpsilonLogitsWarper(0.02)),
    "eta_cutoff": (0.01, lambda: lp.EtaLogitsWarper(0.02)),
}
STOPS = {
    "max_length": (WIDTH + 5, lambda: MaxLengthCriteria(WIDTH + 8)),
    "max_time": (0.0, lambda: MaxTimeCriteria(1000.0)),
    "eos_token_id": (ENDS, lambda: EosTokenCriteria(PLAIN[0][8])),
}
NO_EFFECT = {
    "forced_bos_token_id",
    "remove_invalid_values",
    "renormalize_logits",
}  # on these texts, in transformers either


class SeesTheBatch(lp.LogitsProcessor):
    """A user's processor that counts from the padded width and looks at the padding: it moves the choice in every row,
    differently.
    """

    def __call__(self, input_ids, scores):
        new, pads = input_ids.shape[1] - WIDTH, (input_ids[:, :WIDTH] == PAD).sum(1)
        favoured = (5 + 7 * new + 3 * pads) % VOCAB
        return scores.scatter_add(1, favoured[:, None], torch.full((len(scores), 1), 9.0 * (new % 3 == 1)))


def texts(options, processors=list, criteria=list, **more):
    """The text of transformers, of custom_generate and of our own generate. `processors()` and `criteria()` make the
    user's anew.
    """
    settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=ENDS, pad_token_id=PAD) | options | more
    if "max_length" in options:
        del settings["max_new_tokens"]
    own = lambda: dict(
        logits_processor=LogitsProcessorList(processors()), stopping_criteria=StoppingCriteriaList(criteria())
    )
    theirs = MODEL.generate(IDS, attention_mask=MASK, **own(), **settings)
    inside = MODEL.generate(IDS, attention_mask=MASK, custom_generate=ADAPTER, **own(), **settings)
    direct = GENERATOR.generate(IDS, MASK, generation_config=GenerationConfig(**settings), **own()).sequences
    return theirs, inside, direct


def require_equal(theirs, inside, direct):
    assert inside.equal(theirs), "custom_generate"
    assert direct.equal(theirs), "SpeculativeGenerator.generate"
    return theirs


@pytest.mark.covering
@pytest.mark.parametrize("option", GREEDY)
@pytest.mark.parametrize("beside", ["alone", "beside a user's own", "beside a user's of that type"])
def test_options_of_a_ragged_batch_give_the_text_of_transformers(option, beside):
    value, same_type = GREEDY[option]
    users = {
        "alone": [],
        "beside a user's own": [SeesTheBatch],
        "beside a user's of that type": [SeesTheBatch, same_type],
    }[beside]
    processors = lambda: [make() for make in users]
    text = require_equal(*texts({option: value}, processors))
    if option not in NO_EFFECT:
        assert not text.equal(text_without_options()), "the option must matter for this test to mean something"


@pytest.mark.parametrize("option", SAMPLING)
def test_sampling_options_are_those_of_transformers(option):
    """With one token left the text is known; and the processors of each row are of the types that transformers builds,
    in its order.
    """
    value, same_type = SAMPLING[option]
    options = {"top_k": 1, option: value}
    for processors in (list, lambda: [SeesTheBatch(), same_type()]):
        require_equal(*texts(options, processors, do_sample=True))
        config = GenerationConfig(do_sample=True, max_new_tokens=NEW, **options)
        prepared, _ = MODEL._prepare_generation_config(config)
        MODEL._prepare_special_tokens(prepared, device="cpu")
        theirs = MODEL._get_logits_processor(
            prepared, WIDTH, logits_processor=LogitsProcessorList(processors()), device="cpu", model_kwargs={}
        )
        ours = build_request(specdec.ModelRunner(MODEL), IDS, MASK, config, processors(), None, 0).processors
        assert [[type(p) for p in row] for row in ours._lists] == [[type(p) for p in theirs]] * len(IDS)
        assert len(theirs) >= len(options)


@pytest.mark.parametrize("option", STOPS)
@pytest.mark.parametrize("beside", ["alone", "replaced by a user's"])
def test_stops_of_a_ragged_batch_are_those_of_transformers(option, beside):
    """A user's criterion of the type that the config makes too replaces the config's, also where it stops later."""
    value, same_type = STOPS[option]
    plain = text_without_options()
    alone = require_equal(*texts({option: value}))
    assert alone.equal(plain) == (option == "eos_token_id")  # which is that of all texts here
    if beside != "alone":
        assert not require_equal(*texts({option: value}, criteria=lambda: [same_type()])).equal(alone)


def test_a_criterion_sees_the_padding_as_in_transformers():
    def four_new_and_padded(ids, scores, **_):
        return torch.tensor([len(row[WIDTH:]) >= 4 + int((row[:WIDTH] == PAD).sum()) % 5 for row in ids])

    text = require_equal(*texts({}, criteria=lambda: [four_new_and_padded]))
    assert len({int((row != PAD).sum()) - int(mask.sum()) for row, mask in zip(text, MASK, strict=True)}) > 1


def test_a_row_depends_on_no_other_row_through_the_configs_options():
    """What the config makes sees no padding: each row is as if alone."""
    generator = specdec.SpeculativeGenerator(MODEL, specdec.PromptLookupDrafter())
    config = GenerationConfig(
        max_new_tokens=NEW,
        repetition_penalty=1.8,
        no_repeat_ngram_size=1,
        min_new_tokens=6,
        eos_token_id=ENDS,
        pad_token_id=PAD,
    )
    batch = generator.generate(IDS, MASK, generation_config=config)
    for row, mask in enumerate(MASK):
        alone = generator.generate(IDS[row : row + 1, mask == 1], generation_config=config)
        length = int(alone.lengths)
        assert int(batch.lengths[row]) == length
        assert batch.sequences[row, WIDTH : WIDTH + length].tolist() == alone.sequences[0, -length:].tolist()


def test_every_option_that_makes_a_processor_or_a_criterion_is_compared():
    """Read off transformers' own functions, so that a release's new option is noticed."""
    read = set()
    for function in (GenerationMixin._get_logits_processor, GenerationMixin._get_stopping_criteria):
        read |= set(re.findall(r"generation_config\.([a-z]\w*)", inspect.getsource(inspect.unwrap(function))))
    elsewhere = {
        "use_cache",
        "num_beams",
        "num_return_sequences",
        "do_sample",
        "is_assistant",
        "assistant_confidence_threshold",
        "stop_strings",
    }
    assert read - elsewhere - set(UNSUPPORTED) == (set(GREEDY) | set(SAMPLING) | set(STOPS)) - {"eos_token_id"}


def rows_of_a_batch():
    """Processors of transformers that hold something for each row of a batch."""
    kept = {
        "encoder repetition penalty": lambda: lp.EncoderRepetitionPenaltyLogitsProcessor(
            0.05, torch.arange(40, 40 + 8 * len(IDS)).view(len(IDS), 8)
        ),
        "encoder n-grams": lambda: lp.EncoderNoRepeatNGramLogitsProcessor(1, torch.tensor(PLAIN)[:, :6].roll(1, 0)),
    }
    if "Tensor" in str(inspect.signature(lp.RepetitionPenaltyLogitsProcessor)):
        kept["repetition penalty"] = lambda: lp.RepetitionPenaltyLogitsProcessor(2.5, torch.tensor([0, 21, 5, 22]))
    return kept


@pytest.mark.parametrize("name", rows_of_a_batch())
def test_what_a_processor_keeps_for_each_row_goes_with_the_row(name):
    text = require_equal(*texts({}, lambda: [rows_of_a_batch()[name]()], eos_token_id=None))
    assert not text[:, WIDTH:].equal(torch.tensor(PLAIN))
