"""Constrained decoding: with any drafter the text is that of plain decoding, and nothing is asked that plain decoding
would not ask.
"""

import ast
import functools
import inspect
import json

import pytest
import torch
from transformers import LogitsProcessorList, SynthIDTextWatermarkingConfig
from transformers.generation import LogitsProcessor, logits_process

import specdec
from specdec import Draft, TokenTree
from specdec.drafters.model import choose_children, level_plan
from specdec.sampling import grammar
from specdec.sampling.processors import WITH_MEMORY
from tests.families import VOCAB, build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS
from tests.specdec.generation.test_generators import PAIR, SMALL, p_value

INF = float("inf")
TREE = TokenTree.from_widths((3, 2))


class Steps(LogitsProcessor):
    """After a token t the tokens t + 1 to t + `most` (modulo the vocabulary) are allowed, after the prompt any.

    It raises for a text that broke the rule, for one that goes on after an end token and for one that is `longest`
    tokens long: plain decoding never gives it such a text."""

    def __init__(self, width, most=2, end=None, longest=None):
        self.width, self.most, self.end, self.longest = width, most, end, longest

    def __call__(self, input_ids, scores):
        (text,) = input_ids[:, self.width :].tolist()
        assert self.longest is None or len(text) < self.longest, "too long"
        assert self.end not in text, "behind the end"
        for before, token in zip(text, text[1:], strict=False):
            assert (token - before) % scores.shape[1] in range(1, self.most + 1), "a broken text"
        if not text:
            return scores
        kept = torch.full_like(scores, -INF)
        some = [(text[-1] + i) % scores.shape[1] for i in range(1, self.most + 1)]
        kept[:, some] = scores[:, some]
        return kept


@pytest.mark.covering(cases=8)
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_processor_is_called_for_no_text_that_plain_decoding_would_not_write(name, do_sample):
    """A strict grammar with one or two tokens a state, an end token in reach and a length limit."""
    target, (ids, mask) = build("llama"), ragged_prompts(4)
    width = ids.shape[1]
    options = dict(max_new_tokens=18, do_sample=do_sample, seed=1)
    end = int(
        specdec.AutoregressiveGenerator(target)
        .generate(ids, mask, logits_processor=[Steps(width)], **options)
        .sequences[0, width + 8]
    )
    target.generation_config.eos_token_id = end
    processors = lambda: [Steps(width, end=end, longest=18)]
    plain = specdec.AutoregressiveGenerator(target).generate(ids, mask, logits_processor=processors(), **options)
    generator = specdec.SpeculativeGenerator(target, DRAFTERS[name](target, noisy_copy("llama")))
    out = generator.generate(ids, mask, logits_processor=processors(), **options)
    assert do_sample or out.sequences.equal(plain.sequences)
    for row, length in zip(out.sequences[:, width:].tolist(), out.lengths.tolist(), strict=True):
        text = row[:length]
        assert all((b - a) % VOCAB in (1, 2) for a, b in zip(text, text[1:], strict=False)) and end not in text[:-1]
        assert length == 18 or text[-1] == end
    assert (not do_sample and out.stats.pooled.tokens_per_round == 1) or sum(out.stats.pooled.proposed) > 0


def two_or_one_allowed(ids, scores):
    """After an even token two tokens, after an odd one one, after the prompt all but one."""
    kept = torch.full_like(scores, -INF)
    for row, last in enumerate(ids[:, -1].tolist()):
        after = [last - 1, (last + 1) % SMALL] if last % 2 == 0 and last else [(last + 2) % SMALL]
        some = [t for t in range(SMALL) if t != 3] if ids.shape[1] == 3 else after
        kept[row, some] = scores[row, some]
    return kept


# one drafter for each kind of draft, and each way to choose a tree
FIRST = ("none", "chain", "tree", "dynamic tree", "suffix", "Medusa heads", "DSpark, best-first tree", "merged chains")


def marks_of(name):
    """`make thorough` runs the drafters that are not FIRST."""
    return () if name in FIRST else (pytest.mark.thorough,)


@pytest.mark.covering(cases=3)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in DRAFTERS])
def test_constrained_samples_have_the_targets_distribution(name):
    """Children for which no token is left, branches that end and limits never change it."""
    value = p_value(
        drafter=DRAFTERS[name], layers=2, rows=1000, calls=1, length=3, logits_processor=[two_or_one_allowed]
    )
    assert value > 1e-3


def test_children_at_minus_infinity_are_absent():
    scores = torch.tensor([[[0.0, -INF, 2.0, -INF]], [[1.0, 3.0, 2.0, 0.0]], [[-INF] * 4]])
    level = level_plan(TokenTree.from_widths((3,)), scores.device)[0]
    tokens, exists = choose_children(scores, level, None)
    assert exists.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert tokens[0, :2].tolist() == [2, 0] and tokens[1].tolist() == [1, 2, 0]
    chain = level_plan(TokenTree.chain(1), scores.device)[0]
    assert choose_children(scores, chain, None)[1].tolist() == [[True], [True], [False]]
    q = torch.empty_like(scores)
    tokens, exists = choose_children(scores, level, torch.full((3, 3), 0.5), q, open_ended=True)
    assert exists.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert q.sum(-1).allclose(torch.ones(3, 1)) and q[:2].allclose(scores[:2].softmax(-1))


def test_a_greedy_tree_has_no_more_children_than_are_allowed():
    """Two tokens a state: a tree of widths 3 and 2 has 2 + 4 nodes, behind the prompt, where all are allowed, 3 + 6;
    near the limit fewer.
    """
    target, ids = build("llama"), torch.arange(5, 9)[None]
    out = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(noisy_copy("llama"), tree=TREE)).generate(
        ids, max_new_tokens=24, logits_processor=[Steps(4)])  # fmt: skip
    proposed = out.stats.rows[0].proposed
    assert proposed[0] == 3 + 6 and set(proposed[1:-1]) == {2 + 4}


class Says:
    """A drafter of one chain, always the same."""

    traits = specdec.DrafterTraits(2)

    def __init__(self, *tokens):
        self.tokens = tokens

    def validate(self, target):
        pass

    def start(self, rows, max_tokens):
        return specdec.StatelessSession(self.propose)

    def propose(self, batch, tree=None):
        drafted = torch.tensor([self.tokens]).expand(batch.size, -1)
        return Draft(TokenTree.chain(2), torch.cat([batch.last_tokens(), drafted], 1))


def test_only_a_path_that_is_emitted_may_be_without_a_score():
    """Token 0 is the argmax of scores that are all -inf: drafted there, it is no way on. A dead end that the target
    does not take is none.
    """
    target, ids = build("llama"), torch.arange(5, 9)[None]
    plain = specdec.AutoregressiveGenerator(target).generate(ids, max_new_tokens=8).sequences
    first = int(plain[0, 4])
    other = (first + 1) % VOCAB

    def dead_behind(token):
        return lambda ids, scores: (
            torch.full_like(scores, -INF) if ids.shape[1] > 4 and int(ids[0, -1]) == token else scores
        )

    generator = specdec.SpeculativeGenerator(target, Says(other, 0))
    assert generator.generate(ids, max_new_tokens=8, logits_processor=[dead_behind(other)]).sequences.equal(plain)
    for drafter in (Says(first, 0), Says(first, 5), specdec.ModelDrafter(target, 3), None):
        generator = (
            specdec.SpeculativeGenerator(target, drafter) if drafter else specdec.AutoregressiveGenerator(target)
        )
        with pytest.raises(ValueError, match="left the target model no finite score in row 0 after"):
            generator.generate(ids, max_new_tokens=8, logits_processor=[dead_behind(first)])


def test_each_row_of_a_batch_has_its_number():
    target, (ids, mask) = build("llama"), ragged_prompts(3)
    allowed = lambda row, text: [t for t in range(3, VOCAB) if t % 4 == (int(text[-1]) + row) % 4]
    options = dict(attention_mask=mask, max_new_tokens=12)
    want = target.generate(ids, do_sample=False, prefix_allowed_tokens_fn=allowed, **options)
    assert not want.equal(
        target.generate(ids, do_sample=False, prefix_allowed_tokens_fn=lambda row, text: allowed(0, text), **options)
    )
    for name in ("tree", "prompt lookup", "dynamic tree"):
        drafter = DRAFTERS[name](target, noisy_copy("llama"))
        got = target.generate(
            ids,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            custom_generate=specdec.custom_generate(drafter),
            **options,
        )
        assert got.equal(want)
        processor = logits_process.PrefixConstrainedLogitsProcessor(allowed, 1)
        assert (
            specdec.SpeculativeGenerator(target, drafter)
            .generate(ids, logits_processor=[processor], **options)
            .sequences.equal(want)
        )


def synth_id(vocabulary=VOCAB):
    config = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123, 340], ngram_len=3)
    return config.construct_processor(vocabulary, "cpu")


def test_a_processor_with_a_memory_goes_with_plain_decoding_only():
    target, (ids, mask) = build("llama"), ragged_prompts(3)
    options = dict(attention_mask=mask, max_new_tokens=12)
    want = target.generate(ids, do_sample=False, logits_processor=LogitsProcessorList([synth_id()]), **options)
    assert not want.equal(target.generate(ids, do_sample=False, **options)), "the watermark must matter"
    plain = specdec.AutoregressiveGenerator(target)
    assert plain.generate(ids, logits_processor=[synth_id()], **options).sequences.equal(want)
    drafter = specdec.PromptLookupDrafter()
    with pytest.raises(ValueError, match="SynthIDTextWatermarkLogitsProcessor remembers the calls before"):
        specdec.SpeculativeGenerator(target, drafter).generate(ids, logits_processor=[synth_id()], **options)
    with pytest.raises(ValueError, match="SynthIDTextWatermarkLogitsProcessor remembers"):
        target.generate(ids, logits_processor=[synth_id()], custom_generate=specdec.custom_generate(drafter), **options)
    guided = lambda: logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, target)
    alone = target.generate(
        ids[:1], do_sample=False, max_new_tokens=9, logits_processor=LogitsProcessorList([guided()])
    )
    assert plain.generate(ids[:1], max_new_tokens=9, logits_processor=[guided()]).sequences.equal(alone)
    with pytest.raises(ValueError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor .* use batch size 1, not 3"):
        plain.generate(ids, logits_processor=[guided()], **options)


def test_all_processors_of_transformers_with_a_memory_are_known():
    """Read off the source: whoever writes to itself outside of `__init__` has a memory, or is one of those that only
    prepare something.
    """
    prepares = {
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "WhisperTimeStampLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
    }
    writers = set()
    for kind in ast.parse(inspect.getsource(logits_process)).body:
        if isinstance(kind, ast.ClassDef) and "Processor" in str(
            [base.id for base in kind.bases if isinstance(base, ast.Name)]
        ):
            for method in kind.body:
                if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                    stores = [
                        node
                        for node in ast.walk(method)
                        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store)
                    ]
                    if any(ast.unparse(node).startswith("self.") for node in stores):
                        writers.add(kind.name)
    assert (
        writers - prepares <= WITH_MEMORY
        and {"SynthIDTextWatermarkLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor"} <= writers
    )


def test_an_exception_names_the_processor_or_the_criterion():
    target, ids = build("llama"), torch.arange(5, 9)[None]
    generator = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(noisy_copy("llama"), 3))

    class Counting(LogitsProcessor):
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            assert input_ids.shape[1] == 3 + self.calls, "one call a token"
            return scores

    with pytest.raises(
        RuntimeError,
        match="(?s)the logits processor Counting raised AssertionError after .*one call a token.*a function of",
    ) as raised:
        generator.generate(ids, max_new_tokens=8, logits_processor=[Counting()])
    assert isinstance(raised.value.__cause__, AssertionError)
    specdec.AutoregressiveGenerator(target).generate(ids, max_new_tokens=8, logits_processor=[Counting()])

    def needs_scores(ids, scores):
        return scores[0] > 0

    with pytest.raises(
        RuntimeError, match="the stopping criterion needs_scores raised TypeError after 5 tokens"
    ) as raised:
        generator.generate(ids, max_new_tokens=8, stopping_criteria=[needs_scores])
    assert isinstance(raised.value.__cause__, TypeError)
    for runner in (generator.target, generator.drafter.runner):
        assert runner.cache.free_pages == runner.cache.num_pages


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}, "n": {"enum": [1, 12, 123]}},
    "required": ["name", "ok", "n"],
    "additionalProperties": False,
}
END = PAIR.tokenizer.eos_token_id


def by_xgrammar():
    xgrammar = pytest.importorskip("xgrammar")
    info = xgrammar.TokenizerInfo.from_huggingface(
        PAIR.tokenizer, vocab_size=PAIR.target.config.vocab_size, stop_token_ids=[END]
    )
    return grammar.xgrammar_processor(xgrammar.GrammarCompiler(info).compile_json_schema(SCHEMA, any_whitespace=False))


def by_llguidance():
    llguidance = pytest.importorskip("llguidance")
    hf = pytest.importorskip("llguidance.hf")
    tokenizer = hf.from_tokenizer(PAIR.tokenizer, n_vocab=PAIR.target.config.vocab_size, eos_token=END)
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return grammar.llguidance_processor(
        tokenizer, llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, defaults=spaces)
    )


PROMPTS = PAIR.tokenizer(["values = ", "import json\n\ndata = "], return_tensors="pt", padding=True)


@functools.cache
def grammar_and_text(make):
    """A processor, and transformers' own greedy text with it."""
    processor = make()
    options = dict(do_sample=False, eos_token_id=END, pad_token_id=1, attention_mask=PROMPTS.attention_mask)
    return processor, PAIR.target.generate(
        PROMPTS.input_ids, logits_processor=LogitsProcessorList([processor]), max_new_tokens=48, **options
    )


# how a matcher rolls back does not depend on the drafter, so the first library meets one drafter of each class and kind
# of draft, the second one of each shape; processors in Python meet every drafter above. `make test` runs those of FIRST
ALIKE = {"most likely tree", "early exit, tree", "synthetic", "merged with heads", "MTP", "P-EAGLE"}
MATCHED = [pytest.param(by_xgrammar, name, marks=marks_of(name)) for name in ("none", *DRAFTERS) if name not in ALIKE]
MATCHED += [(by_llguidance, name) for name in ("none", "chain", "tree", "dynamic tree")]


@pytest.mark.covering(cases=5)
@pytest.mark.parametrize(("make", "name"), MATCHED)
def test_a_grammars_text_is_that_of_plain_decoding(make, name):
    """Greedy: token for token transformers' own batch with the same processor; sampled: a text of the grammar."""
    processor, want = grammar_and_text(make)
    ids, options = PROMPTS.input_ids, dict(attention_mask=PROMPTS.attention_mask, max_new_tokens=48)
    width, drafter = ids.shape[1], None if name == "none" else DRAFTERS[name](PAIR.target, PAIR.draft)
    generator = specdec.SpeculativeGenerator(PAIR.target, drafter)
    out = generator.generate(ids, logits_processor=[processor], **options)
    assert out.sequences.equal(want)
    sampled = generator.generate(ids, logits_processor=[processor], do_sample=True, seed=2, **options)
    for sequences in (out.sequences, sampled.sequences):
        for row in sequences[:, width:].tolist():
            text = json.loads(PAIR.tokenizer.decode(row[: row.index(END)]))
            assert (
                list(text) == ["name", "ok", "n"]
                and text["n"] in (1, 12, 123)
                and type(text["ok"]) is bool
                and len(text["name"]) <= 6
            )


@pytest.mark.parametrize("make", [by_xgrammar, by_llguidance])
def test_a_grammar_can_be_asked_in_any_order(make):
    """A refused token, the end of the text and everything behind it leave the answer about any other text as it is."""
    text = PAIR.tokenizer('{"name": "ab", "ok": true, "n": 12}').input_ids
    scores = torch.zeros(1, PAIR.target.config.vocab_size + 3)  # a model may have more tokens than its tokenizer
    fresh = lambda: make().for_row(0, width=0)
    ask = lambda processor, tokens: processor(torch.tensor([tokens], dtype=torch.int64).view(1, -1), scores).isfinite()[
        0
    ]
    used = fresh()
    for count in (len(text), 3, 0, 7, len(text), 5):
        ask(used, [*text[:count], 5, 6])  # whatever these are
        ask(used, [*text, END, 7])
        assert ask(used, text[:count]).equal(ask(fresh(), text[:count])), count
        allowed = ask(used, text[:count])
        assert allowed[text[count] if count < len(text) else END] and not allowed[-3:].any()
    assert not ask(used, [*text[:2], END]).any() and ask(used, [*text, END]).all()
