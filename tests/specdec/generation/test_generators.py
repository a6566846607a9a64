"""The generators against transformers: greedy token for token, sampling in distribution, every option, every stop."""

import math

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec.sampling.draws import draw
from specdec.sampling.noise import Stream
from tests.families import CONFIGS, VOCAB, build, noisy_copy, ragged_prompts

PAIR = specdec.load_tiny_pair()


def speculative(name: str = "llama", num_tokens: int = 4) -> specdec.SpeculativeGenerator:
    return specdec.SpeculativeGenerator(build(name), specdec.ModelDrafter(noisy_copy(name), num_tokens))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_transformers(family, batch):
    """Plain and speculative, ragged left-padded prompts, a window shorter than the text where the family has one."""
    ids, mask = ragged_prompts(batch)
    generator = speculative(family)
    model = generator.target.model
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
    out = generator.generate(ids, mask, max_new_tokens=30)
    plain = specdec.AutoregressiveGenerator(generator.target).generate(ids, attention_mask=mask, max_new_tokens=30)
    assert out.sequences.equal(expected) and plain.sequences.equal(expected)
    assert 0 < out.stats.pooled.acceptance_rate <= 1, (
        "the draft must be right sometimes for this test to mean something"
    )
    assert (
        generator.target.cache.sequences == () and generator.target.cache.free_pages == generator.target.cache.num_pages
    )


def test_greedy_equals_transformers_on_all_shipped_prompts():
    """Ragged batches of 8 of every kind, and the first prompt of each alone."""
    generator = specdec.SpeculativeGenerator(PAIR.target, specdec.ModelDrafter(PAIR.draft, 4))
    for prompts in PAIR.prompts.values():
        batch = PAIR.tokenizer(prompts, return_tensors="pt", padding=True)
        expected = PAIR.target.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=24
        )
        assert generator.generate(batch.input_ids, batch.attention_mask, max_new_tokens=24).sequences.equal(expected)
        ids = PAIR.tokenizer(prompts[0], return_tensors="pt").input_ids
        alone = PAIR.target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert generator.generate(ids, max_new_tokens=12).sequences.equal(alone)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_greedy_over_a_quantised_cache_equals_plain_decoding_over_one(kv_dtype):
    """Up to near-ties: float noise between batch shapes (1e-5) may push a number over a rounding boundary, which moves
    logits by some hundredths.
    """
    plain = specdec.AutoregressiveGenerator(PAIR.target, kv_dtype=kv_dtype)
    speculative = specdec.SpeculativeGenerator(
        PAIR.target, specdec.ModelDrafter(PAIR.draft, 4, kv_dtype=kv_dtype), kv_dtype=kv_dtype
    )
    assert speculative.target.kv_dtype == speculative.drafter.runner.kv_dtype == kv_dtype
    prompts = [kind[0] for kind in PAIR.prompts.values()]
    equal = 0
    for prompt in prompts:
        ids = PAIR.tokenizer(prompt, return_tensors="pt").input_ids
        expected, ours = (g.generate(ids, max_new_tokens=24).sequences[0].tolist() for g in (plain, speculative))
        equal += expected == ours
        if expected != ours:
            first = next(i for i in range(ids.shape[1], len(expected) + 1) if expected[: i + 1] != ours[: i + 1])
            logits = last_logits(expected[:first], kv_dtype)
            assert logits[expected[first]] - logits[ours[first]] < 0.2, (
                f"{prompt!r} diverges at token {first} without a near-tie"
            )
            assert logits.max() - logits[expected[first]] < 0.2
    assert equal >= 0.75 * len(prompts)
    assert (
        speculative.target.cache.key_pages.element_size()
        == speculative.drafter.runner.cache.value_pages.element_size()
        == 1
    )


def last_logits(ids: list[int], kv_dtype: str | None, every: bool = False) -> torch.Tensor:
    """The target's logits after `ids`, or at each of them, over a cache of `kv_dtype`."""
    runner = specdec.ModelRunner(PAIR.target, kv_dtype=kv_dtype)
    runner.reserve([len(ids)])
    logits = runner.forward([runner.cache.add()], torch.tensor(ids), [len(ids)]).logits
    return logits if every else logits[-1]


@pytest.mark.parametrize(("kv_dtype", "worst", "perplexity"), [("int8", 0.02, 0.01), ("fp8", 0.06, 0.04)])
def test_a_quantised_cache_changes_the_targets_logits_a_little(kv_dtype, worst, perplexity):
    """Largest error relative to the largest logit, and the perplexity of the model's own text; neither is zero, or
    nothing was quantised.
    """
    ids = PAIR.tokenizer(PAIR.prompts["code"][0], return_tensors="pt").input_ids
    ids = specdec.AutoregressiveGenerator(PAIR.target).generate(ids, max_new_tokens=64).sequences[0]
    full, quantised = (last_logits(ids.tolist(), name, every=True) for name in (None, kv_dtype))
    assert 0 < (full - quantised).abs().max() / full.abs().max() < worst
    losses = [torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item() for logits in (full, quantised)]
    assert 0 < abs(losses[1] - losses[0]) < perplexity


def test_kv_dtypes_that_cannot_be_had_are_named():
    with pytest.raises(ValueError, match="'int4'"):
        specdec.AutoregressiveGenerator(PAIR.target, kv_dtype="int4")
    runner = specdec.ModelRunner(PAIR.target, kv_dtype="int8")
    with pytest.raises(ValueError, match="'int8'.*'fp8'"):
        specdec.SpeculativeGenerator(runner, None, kv_dtype="fp8")
    assert specdec.SpeculativeGenerator(runner, None).target.kv_dtype == "int8"


def test_target_as_its_own_draft_accepts_everything():
    ids, mask = ragged_prompts(3)
    model = build("llama")
    model.generation_config.eos_token_id = None
    out = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(model, 4)).generate(ids, mask, max_new_tokens=25)
    assert out.stats.pooled.acceptance_rate == 1 and out.stats.pooled.tokens_per_round == 5
    assert out.lengths.tolist() == [25, 25, 25]


def test_without_a_seed_torchs_generator_decides():
    ids, mask = ragged_prompts(2)
    generator = speculative()
    run = lambda: generator.generate(ids, mask, max_new_tokens=12, do_sample=True).sequences
    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert run().equal(first) and not second.equal(first)


# --- sampling is exact ------------------------------------------------------------------------------------------------

SMALL = 6


def small_model(seed: int, layers: int = 1):
    config = LlamaConfig(
        vocab_size=SMALL,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    return model


def exact_distribution(model, prompt: list[int], length: int, processors) -> torch.Tensor:
    """`[V ** length]` probabilities of every continuation, by full enumeration with the model's own forward."""
    probabilities = torch.ones(1, dtype=torch.float64)
    prefixes = torch.tensor([prompt])
    for _ in range(length):
        with torch.no_grad():
            scores = model(prefixes).logits[:, -1]
        for processor in processors:
            scores = processor(prefixes, scores)
        p = scores.double().softmax(-1)
        probabilities = (probabilities[:, None] * p).flatten()
        prefixes = torch.cat(
            [prefixes.repeat_interleave(SMALL, 0), torch.arange(SMALL).repeat(len(prefixes))[:, None]], 1
        )
    return probabilities


def p_value(
    rule=None,
    length: int = 3,
    rows: int = 1500,
    calls: int = 4,
    draft_seed: int = 4,
    drafter=None,
    layers: int = 1,
    prompt=(1, 4, 2),
    tree=None,
    logits_processor=(),
    mode=None,
    **options,
) -> float:
    """Chi-square of sampled continuations against the enumeration of all; cells that expect less than 5 are joined.

    drafter: `drafter(target, draft)` makes one.
    options: of the generation config."""
    target, draft, prompt = small_model(3, layers), small_model(draft_seed), list(prompt)
    drafter = specdec.ModelDrafter(draft, 2) if drafter is None else drafter(target, draft)
    generator = specdec.SpeculativeGenerator(target, drafter, rule=rule, tree=tree, mode=mode)
    config = GenerationConfig(do_sample=True, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options))
    prepared, _ = target._prepare_generation_config(config)
    target._prepare_special_tokens(prepared, device="cpu")
    processors = target._get_logits_processor(
        prepared, len(prompt), logits_processor=LogitsProcessorList(), device="cpu", model_kwargs={}
    )
    expected = exact_distribution(target, prompt, length, [*processors, *logits_processor])
    counts = torch.zeros(SMALL**length, dtype=torch.float64)
    powers = SMALL ** torch.arange(length - 1, -1, -1)
    for call in range(calls):
        out = generator.generate(
            torch.tensor([prompt]).expand(rows, -1),
            max_new_tokens=length,
            generation_config=config,
            logits_processor=list(logits_processor),
            seed=call,
        )
        counts += torch.bincount((out.sequences[:, len(prompt) :] * powers).sum(1), minlength=SMALL**length)
    assert counts[expected == 0].sum() == 0, "a token of probability zero was drawn"
    expected = expected * rows * calls
    large = expected >= 5
    observed = [*counts[large].tolist(), float(counts[~large].sum())]
    wanted = [*expected[large].tolist(), float(expected[~large].sum())]
    if wanted[-1] < 5:
        observed, wanted = observed[:-2] + [sum(observed[-2:])], wanted[:-2] + [sum(wanted[-2:])]
    return float(chisquare(observed, [w * sum(observed) / sum(wanted) for w in wanted]).pvalue)


WARPED = ({}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9, "temperature": 1.4})
PENALISED = ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2})


@pytest.mark.covering(cases=3)
@pytest.mark.parametrize("options", WARPED + PENALISED, ids=str)
def test_samples_have_the_targets_distribution(options):
    assert p_value(calls=1 if options in PENALISED else 4, **options) > 1e-3


def accepts_always(draft, scores, noise):
    """Wrong: keeps every drafted token."""
    verdict = specdec.rejection(draft, scores, noise)
    full = torch.full_like(verdict.counts, draft.tree.size - 1)
    path = torch.arange(1, draft.tree.size).expand(len(full), -1)
    return specdec.Acceptance(full, path, draw(scores[:, -1].softmax(-1), noise.uniform(Stream.NEXT, 1)[:, 0]))


def samples_the_target_after_a_rejection(draft, scores, noise):
    """Wrong: draws from p where norm(max(p - q, 0)) is due."""
    verdict = specdec.rejection(draft, scores, noise)
    p = scores.softmax(-1)[torch.arange(len(verdict.counts)), verdict.counts]
    return specdec.Acceptance(verdict.counts, verdict.path, draw(p, noise.uniform(Stream.NEXT, 1)[:, 0]))


def recomputes_q_at_another_temperature(draft, scores, noise):
    """Wrong: a verifier that does not use the distribution the draft was drawn from."""
    hotter = (draft.probs + 1e-20).log().div(2.0).softmax(-1)
    return specdec.rejection(specdec.Draft(draft.tree, draft.tokens, hotter), scores, noise)


@pytest.mark.parametrize(
    "rule", [accepts_always, samples_the_target_after_a_rejection, recomputes_q_at_another_temperature]
)
def test_a_wrong_acceptance_rule_is_caught(rule):
    """The same chi-square, which the right rule passes, fails for each planted bug."""
    assert p_value(rule=rule) < 1e-6


def test_measured_acceptance_lies_within_its_interval_of_the_direct_computation():
    """Σ min(p, q) at the very positions that were put to the test, on the shipped pair: acceptances minus expectation
    within 4 sigma.
    """
    drafts, seen = [], []

    def recording(draft, scores, noise):
        verdict = specdec.rejection(draft, scores, noise)
        drafts.append(torch.minimum(scores[:, :-1].softmax(-1), draft.probs).sum(-1)[0])
        seen.append(int(verdict.counts[0]))
        return verdict

    generator = specdec.SpeculativeGenerator(PAIR.target, specdec.ModelDrafter(PAIR.draft, 4), rule=recording)
    for number, prompt in enumerate(p for prompts in PAIR.prompts.values() for p in prompts[:3]):
        generator.generate(
            PAIR.tokenizer(prompt, return_tensors="pt").input_ids, max_new_tokens=48, do_sample=True, seed=number
        )
    tested = [(probability[: count + 1], count) for probability, count in zip(drafts, seen, strict=True)]
    expected = sum(float(p.sum()) for p, _ in tested)
    variance = sum(float((p * (1 - p)).sum()) for p, _ in tested)
    assert sum(count for _, count in tested) == pytest.approx(expected, abs=4 * math.sqrt(variance))
    assert sum(len(p) for p, _ in tested) > 300


# --- options ----------------------------------------------------------------------------------------------------------


def test_one_or_several_end_tokens_cut_inside_an_accepted_block():
    """Greedy rows end where transformers' end, with the pad token behind, for each token of the text taken as the
    end.
    """
    ids, mask = ragged_prompts(4)
    model = build("llama")
    generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(model, 5))
    model.generation_config.eos_token_id = None
    text = generator.generate(ids, mask, max_new_tokens=20).sequences[:, 21:]
    for eos in ([int(text[0, 3])], [int(text[0, 7]), int(text[2, 4])], [int(text[1, 0])]):
        model.generation_config.eos_token_id = eos
        expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
        out = generator.generate(ids, mask, max_new_tokens=20)
        assert out.sequences.equal(expected)
        ends = [next((i + 1 for i, t in enumerate(row) if t in eos), 20) for row in text.tolist()]
        assert out.lengths.tolist() == ends
        assert [sum(r.emitted) for r in out.stats.rows] == ends


CONFIG_OPTIONS = (
    dict(repetition_penalty=1.7),
    dict(min_new_tokens=9),
    dict(min_length=27),
    dict(bad_words_ids=[[5], [7, 8]]),
    dict(no_repeat_ngram_size=2),
    dict(suppress_tokens=[3, 4, 5, 6]),
    dict(forced_eos_token_id=9),
    dict(exponential_decay_length_penalty=(3, 1.5)),
)


@pytest.mark.parametrize("options", CONFIG_OPTIONS, ids=str)
def test_generation_config_acts_on_every_drafted_position(options):
    """Each row equals transformers' output for that prompt alone: processors see the row's own prefix, without padding.
    `min_length` alone counts the padding of a batch, in transformers and here."""
    ids, mask = ragged_prompts(3)
    generator = speculative()
    model = generator.target.model
    model.generation_config.eos_token_id = (
        2 if "min_new_tokens" not in options and "min_length" not in options else list(range(40))
    )
    config = GenerationConfig(max_new_tokens=14, do_sample=False, **options)
    out = generator.generate(ids, mask, generation_config=config)
    for row in range(3):
        prompt = ids[row : row + 1, mask[row] == 1]
        if "min_length" in options:
            config.min_length = options["min_length"] - 21 + prompt.shape[1]
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[
            0, prompt.shape[1] :
        ]
        assert out.sequences[row, 21 : 21 + len(expected)].equal(expected)
        assert int(out.lengths[row]) == len(expected)


class EvenAfterEven(LogitsProcessor):
    """Prefix-dependent: after an even token only even ones."""

    def __call__(self, input_ids, scores):
        if input_ids[0, -1] % 2:
            return scores
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, float("-inf"))


class StopAtLength(StoppingCriteria):
    """Ends a row once it holds a token divisible by ten behind its prompt of known length."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([bool((input_ids[0, 5:] % 10 == 0).any())])


def test_custom_processors_and_criteria():
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (1, 5))
    generator = speculative()
    model = generator.target.model
    for criteria in (None, StoppingCriteriaList([StopAtLength()])):
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=25,
            logits_processor=LogitsProcessorList([EvenAfterEven()]),
            stopping_criteria=criteria,
        )
        out = generator.generate(ids, max_new_tokens=25, logits_processor=[EvenAfterEven()], stopping_criteria=criteria)
        assert out.sequences.equal(expected)


class Recorder(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_receives_each_rounds_tokens():
    ids, mask = ragged_prompts(1)
    streamer = Recorder()
    out = speculative().generate(ids, mask, max_new_tokens=17, streamer=streamer)
    assert streamer.ended and streamer.pieces[0].equal(ids)
    assert torch.cat(streamer.pieces[1:]).equal(out.sequences[0, ids.shape[1] :])
    assert [len(p) for p in streamer.pieces[1:]] == list(out.stats.rows[0].emitted)


def test_stats_count_what_happened():
    ids, mask = ragged_prompts(5)
    out = speculative().generate(ids, mask, max_new_tokens=23)
    assert out.stats.new_tokens == int(out.lengths.sum())
    for row, length in zip(out.stats.rows, out.lengths.tolist(), strict=True):
        assert sum(row.emitted) == length and len(row.seconds) == row.rounds - 1
        assert all(0 <= a <= p <= 4 for a, p in zip(row.accepted, row.proposed, strict=True))
        assert all(a <= e <= a + 1 for a, e in zip(row.accepted, row.emitted, strict=True))
    pooled = out.stats.pooled
    assert pooled.rounds == sum(r.rounds for r in out.stats.rows)
    assert pooled.overhead == pytest.approx(pooled.round_seconds / pooled.step_seconds)
    assert pooled.speedup == pytest.approx(pooled.tokens_per_round / pooled.overhead)
    plain = specdec.AutoregressiveGenerator(build("llama")).generate(ids, attention_mask=mask, max_new_tokens=9)
    assert plain.stats.pooled.tokens_per_round == 1 and plain.stats.pooled.acceptance_rate is None


def test_the_last_positions_of_the_model_can_be_used():
    """Prompt + max_new_tokens fill all positions, also of a learned position table; drafts beyond them are harmless."""
    model = build("gpt2")
    generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(noisy_copy("gpt2"), 5))
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, 140))
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert generator.generate(ids, max_new_tokens=20).sequences.equal(expected)


def test_a_long_prompt_goes_through_in_chunks(monkeypatch):
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_CHUNK", 7)
    ids, mask = ragged_prompts(6)
    generator = speculative("gemma2")
    expected = generator.target.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    assert generator.generate(ids, mask, max_new_tokens=12).sequences.equal(expected)


def test_many_prompts_go_through_a_few_at_a_time(monkeypatch):
    """No forward holds more prompt tokens than it should, and of prompts no position but the last has logits."""
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_TOKENS", 20)
    ids, mask = ragged_prompts(6)
    generator, seen = speculative("llama"), []
    run = specdec.ModelRunner.forward_batch

    def spy(self, tokens, *rest):
        out = run(self, tokens, *rest)
        seen.append((len(tokens), len(out.logits)))
        return out

    monkeypatch.setattr(specdec.ModelRunner, "forward_batch", spy)
    expected = generator.target.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    assert generator.generate(ids, mask, max_new_tokens=12).sequences.equal(expected)
    nodes = 6 * (4 + 2)  # of the six drafts and the tokens before them
    assert max(tokens for tokens, _ in seen) <= max(20, nodes) and max(logits for _, logits in seen) <= 6 * 5


def test_the_model_is_left_as_it_was():
    """Its own generate gives the same before and after, and its attention setting is untouched."""
    ids, mask = ragged_prompts(2)
    model = build("gemma3")
    before = (
        model.config._attn_implementation,
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8),
    )
    specdec.AutoregressiveGenerator(model).generate(ids, attention_mask=mask, max_new_tokens=8)
    assert model.config._attn_implementation == before[0]
    assert model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8).equal(before[1])


def test_bfloat16_runs():
    ids, mask = ragged_prompts(2)
    target, draft = build("llama").bfloat16(), noisy_copy("llama").bfloat16()
    out = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(draft, 3)).generate(
        ids, mask, max_new_tokens=10, do_sample=True, seed=0
    )
    assert out.lengths.max() <= 10
