"""Draft models that are not quite like their target: another dtype, fewer positions, a table with other padding."""

import copy
import warnings
from functools import cache
from itertools import product

import pytest
import torch

import specdec
from specdec import TokenTree
from specdec.acceptance import block, rejection, tree_distinct, tree_exact
from specdec.drafters.vocabulary import require_one_vocabulary
from specdec.planning.policy import PLAIN
from tests.families import VOCAB, build, ragged_prompts
from tests.matrix import at_each_run
from tests.specdec.drafters.test_drafters import WORDS, word_tokenizer
from tests.specdec.generation.test_generators import SMALL, noisy_copy, p_value

TREE = TokenTree.from_widths((3, 2, 1))
DRAFTERS = {
    "chain": lambda draft: specdec.ModelDrafter(draft, 4),
    "confident chain": lambda draft: specdec.ModelDrafter(draft, 4, confidence=0.3),
    "tree": lambda draft: specdec.ModelDrafter(draft, tree=TREE),
    "likely tree": lambda draft: specdec.ModelDrafter(draft, tree=TREE, sample=False),
    "dynamic tree": lambda draft: specdec.DynamicTreeDrafter(draft, 9, depth=4, width=3),
    "merged": lambda draft: specdec.MergedDrafter(
        specdec.DynamicTreeDrafter(draft, 6, 3, 3), specdec.PromptLookupDrafter(4, 2), 11
    ),
    "merged models": lambda draft: specdec.MergedDrafter(
        specdec.ModelDrafter(draft, 3, sample=False), specdec.DynamicTreeDrafter(copy.deepcopy(draft), 6, 3, 3)
    ),
    "translated": lambda draft: specdec.TranslatedDrafter(draft, word_tokenizer(WORDS), word_tokenizer(WORDS), 3),
}  # fmt: skip
MODELS = [name for name in DRAFTERS if name != "translated"]  # all but the one with a vocabulary of its own
FEW = ("chain", "tree", "dynamic tree", "merged")
MODES = [(name, "eager") for name in MODELS] + [(name, "graph") for name in FEW]
# in the whole generator against the enumerated distribution: (drafter, rule)
SAMPLED = {
    "chain": (lambda draft: specdec.ModelDrafter(draft, 2), rejection),
    "blocks": (lambda draft: specdec.ModelDrafter(draft, 2), block),
    "tree": (lambda draft: specdec.ModelDrafter(draft, tree=TokenTree.from_widths((2, 2))), tree_distinct),
    "likely tree": (
        lambda draft: specdec.ModelDrafter(draft, tree=TokenTree.from_widths((2, 1)), sample=False),
        tree_exact,
    ),
    "dynamic tree": (lambda draft: specdec.DynamicTreeDrafter(draft, 5, 2, 3), None),
}
TEXT = 24  # new tokens


def plain(model, ids, mask, count=TEXT):
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count)


def generator(target, drafter, mode="eager", **options):
    runner = specdec.ModelRunner(target, mode="eager")
    runner.mode = mode  # "graph" is refused by the constructor on a CPU, where the captured function is called
    return specdec.SpeculativeGenerator(runner, drafter, **options)


def check(target, draft, name, mode="eager", batch=4, **options):
    """The target's own greedy text, and all pages back; returns the greedy output."""
    ids, mask = ragged_prompts(batch)
    drafting = generator(target, DRAFTERS[name](draft), mode, **options)
    out = drafting.generate(ids, mask, max_new_tokens=TEXT)
    assert out.sequences.equal(plain(target, ids, mask))
    drafting.generate(ids, mask, max_new_tokens=5, do_sample=True, seed=1)
    runners = [drafting.target, *(state for state in [getattr(drafting.drafter, "runner", None)] if state)]
    assert all(r.cache.sequences == () and r.cache.free_pages == r.cache.num_pages for r in runners)
    assert (out.stats.host is None) == (mode == "graph")
    return out


@cache
def usual(name, mode="eager", batch=4):
    """The statistics of a draft model that differs in nothing."""
    return check(build("llama"), noisy_copy("llama"), name, mode, batch).stats


# another dtype

DTYPES = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("name", "dtypes"), [
    *((name, DTYPES[0]) for name in DRAFTERS), *((name, d) for name in ("chain", "tree") for d in DTYPES[1:]),
])  # fmt: skip
def test_a_draft_of_another_dtype_keeps_the_text(name, dtypes):
    target, draft = build("llama").to(dtypes[0]), noisy_copy("llama").to(dtypes[1])
    assert check(target, draft, name).stats.pooled.acceptance_rate > 0


@pytest.mark.parametrize("name", FEW)
def test_captured_rounds_take_a_draft_of_another_dtype(name):
    check(build("llama"), noisy_copy("llama").to(torch.bfloat16), name, "graph")


@pytest.mark.parametrize("name", ["chain", "tree", "dynamic tree"])
def test_a_target_in_16_bits_takes_a_draft_in_32(name):
    """Against plain decoding here, up to near-ties: two batch shapes may round a logit to either side."""
    target = build("llama").to(torch.bfloat16)
    ids, mask = ragged_prompts(3)
    drafting = generator(target, DRAFTERS[name](noisy_copy("llama")))
    ours = drafting.generate(ids, mask, max_new_tokens=TEXT).sequences
    for row, text, length in zip(ours.tolist(), plain(target, ids, mask).tolist(), mask.sum(1).tolist(), strict=True):
        if row != text:
            first = next(i for i, (a, b) in enumerate(zip(row, text, strict=True)) if a != b)
            with torch.no_grad():
                logits = target(torch.tensor([text[ids.shape[1] - length : first]])).logits[0, -1].float()
            assert logits.max() - logits[row[first]] <= 0.02 * logits.abs().max(), "a divergence without a near-tie"


@pytest.mark.covering(cases=4)
@pytest.mark.parametrize(("name", "dtype"), [
    *((name, torch.bfloat16) for name in SAMPLED), *product(("chain", "dynamic tree"), (torch.float16, torch.float64)),
])  # fmt: skip
def test_samples_are_exact_with_a_draft_of_another_dtype(name, dtype):
    """All in captured rounds and in bfloat16; other dtypes, which differ in the draft's forward alone, in eager ones
    and with a drafter that draws and one that chooses."""
    make, rule = SAMPLED[name]
    drafter, mode = lambda target, draft: make(draft.to(dtype)), None if dtype == torch.bfloat16 else "eager"
    assert p_value(rule=rule, drafter=drafter, rows=2000, calls=1, mode=mode) > 1e-3


def test_the_distribution_to_verify_is_that_of_the_rounded_logits():
    """What the bfloat16 draft itself says, in float32, and not what it would say in the target's dtype."""
    drafts, draft = [], noisy_copy("llama")
    with torch.no_grad():
        draft.lm_head.weight.mul_(20)
    ids = torch.tensor([[5, 6, 7, 8]])
    in_full = draft(ids).logits[0, -1].softmax(-1)

    def recording(draft, scores, noise):
        drafts.append((draft, scores))
        return rejection(draft, scores, noise)

    drafting = generator(build("llama"), specdec.ModelDrafter(draft.to(torch.bfloat16), 1), rule=recording)
    drafting.generate(ids, max_new_tokens=1, do_sample=True, seed=0)
    found, scores = drafts[0]
    rounded = draft(ids).logits[0, -1].float().softmax(-1)
    assert found.probs.dtype == scores.dtype == torch.float32
    off = [(found.probs[0, 0] - q).abs().max() for q in (rounded, in_full)]
    assert off[0] < off[1] / 10 and float((found.probs.sum(-1) - 1).abs().max()) < 1e-6


def test_a_twin_must_have_the_targets_dtype():
    with pytest.raises(ValueError, match="same dtype, got torch.float64 for the draft and torch.float32"):
        specdec.SpeculativeGenerator(build("llama"), specdec.SyntheticDrafter(build("llama").double(), 0.5))


# fewer positions

SHORT = 30  # positions of the draft; prompts have 1 to 21 tokens


def short_draft(positions=SHORT):
    """The noisy copy, of which rotary embeddings leave nothing that depends on the number of positions."""
    draft = noisy_copy("llama")
    draft.config.max_position_embeddings = positions
    return draft


@pytest.fixture
def seen_positions(monkeypatch):
    """The largest position at which a draft model of SHORT positions ran an accepted token, before any clamping."""
    seen, forward = [], specdec.ModelRunner.forward_batch

    def noting(self, tokens, batch, *more, **options):
        if self.max_positions == SHORT:
            at_each_run(lambda: seen.append(int(batch.positions.max())))
        return forward(self, tokens, batch, *more, **options)

    monkeypatch.setattr(specdec.ModelRunner, "forward_batch", noting)
    return seen


@pytest.mark.covering(cases=5)
@pytest.mark.filterwarnings("ignore:the draft model")
@pytest.mark.parametrize(("name", "mode"), MODES)
def test_rows_that_outgrow_the_draft_go_on_with_plain_steps(name, mode):
    """Ragged rows: each in its own round, the longest first, so that some still draft while others do not."""
    out = check(build("llama"), short_draft(), name, mode)
    unlimited = usual(name, mode)
    for row, free, length in zip(out.stats.rows, unlimited.rows, ragged_prompts(4)[1].sum(1).tolist(), strict=True):
        drafted = sum(length + sum(row.emitted[:i]) <= SHORT for i in range(len(row.emitted)))
        assert all(row.proposed[: drafted - 1]) and row.proposed[0] == free.proposed[0]
        if "merged" not in name or "models" in name:
            assert set(row.proposed[drafted:]) <= {0} and set(row.emitted[drafted:]) <= {1}
            assert (drafted < len(row.emitted)) == (length + TEXT > SHORT + 5)
    assert out.stats.pooled.tokens_per_round < unlimited.pooled.tokens_per_round


@pytest.mark.filterwarnings("ignore:the draft model")
@pytest.mark.parametrize("name", [name for name in MODELS if "merged" not in name])
def test_captured_rounds_end_drafting_where_eager_ones_do(name):
    ids, mask = (x.flip(0) for x in ragged_prompts(4))  # the rows that end first have pages after those of others
    pair = [generator(build("llama"), DRAFTERS[name](short_draft()), mode) for mode in ("eager", "graph")]
    for options in ({}, {"do_sample": True, "seed": 3, "top_k": 9}):
        host, device = (one.generate(ids, mask, max_new_tokens=TEXT, **options) for one in pair)
        assert device.sequences.equal(host.sequences)
        for mine, theirs in zip(device.stats.rows, host.stats.rows, strict=True):
            for field in ("proposed", "accepted", "emitted", "depths", "ranks", "shapes"):
                assert getattr(mine, field) == getattr(theirs, field), field
        assert options or PLAIN.name in device.stats.pooled.shapes


@pytest.mark.filterwarnings("ignore:the draft model")
@pytest.mark.parametrize("name", ["chain", "tree", "dynamic tree"])
def test_a_row_far_past_the_drafts_end_leaves_the_pages_of_others_alone(name):
    """Its prompt needs more pages than it has in the draft's cache, of which none was written; the first is another
    row's."""
    ids = torch.randint(3, VOCAB, (3, 70), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(70) >= 70 - torch.tensor([5, 3, 70])[:, None]).long()
    ids = ids.where(mask == 1, 1)
    pair = [generator(build("llama"), DRAFTERS[name](short_draft()), mode) for mode in ("eager", "graph")]
    for one in pair:
        one.generate(ids, mask, max_new_tokens=TEXT)  # makes the caches
        one.drafter.runner.cache.key_pages.fill_(float("nan"))
        one.drafter.runner.cache.value_pages.fill_(float("nan"))
    host, device = (one.generate(ids, mask, max_new_tokens=TEXT) for one in pair)
    assert device.sequences.equal(host.sequences)
    assert [row.accepted for row in device.stats.rows] == [row.accepted for row in host.stats.rows]
    assert set(host.stats.rows[2].proposed) == {0} and sum(host.stats.rows[0].accepted) > 0


@pytest.mark.filterwarnings("ignore:the draft model")
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_draft_runs_no_text_beyond_its_positions(mode, seen_positions):
    """A prompt that is too long never runs; drafted nodes after the last accepted token may lie beyond the end."""
    target, ids = build("llama"), torch.arange(5, 45)[None]
    drafting = generator(target, specdec.ModelDrafter(short_draft(), 3), mode)
    assert drafting.generate(ids, max_new_tokens=20).sequences.equal(plain(target, ids, torch.ones_like(ids), 20))
    assert seen_positions == [5] or max(seen_positions, default=0) < SHORT, "the comparison when it was wrapped"
    seen_positions.clear()
    drafting.generate(ids[:, :20], max_new_tokens=30)
    assert 20 <= max(seen_positions) < SHORT + 3


@pytest.mark.covering(cases=2)
@pytest.mark.filterwarnings("ignore:the draft model")
@pytest.mark.parametrize("name", FEW)
def test_a_row_does_not_depend_on_which_rows_are_too_long(name):
    """Sampled: the longest row, in a plain step once it is alone, beside rows that still draft, and in either mode."""
    ids, mask = ragged_prompts(4)
    texts = []
    for mode, count in (("eager", 4), ("eager", 1), ("graph", 4), ("graph", 1)):
        drafting = generator(build("llama"), DRAFTERS[name](short_draft()), mode)
        options = dict(max_new_tokens=TEXT, do_sample=True, temperature=0.8, seed=6)
        texts.append(drafting.generate(ids[:count], mask[:count], **options).sequences[0].tolist())
    assert texts[1:] == texts[:1] * 3


@pytest.mark.filterwarnings("ignore:the draft model")
def test_a_tree_of_any_policy_stops_there_too():
    target = build("llama")
    ids, mask = ragged_prompts(2)
    for tree in ("auto", TREE, TokenTree.chain(2)):
        drafting = generator(target, specdec.ModelDrafter(short_draft(), 3), tree=tree)
        assert drafting.generate(ids, mask, max_new_tokens=34).sequences.equal(plain(target, ids, mask, 34))


@pytest.mark.filterwarnings("ignore:the draft model")
def test_processors_that_read_the_text_work_beside_rows_that_are_too_long():
    target = build("llama")
    ids, mask = ragged_prompts(4)
    target.generation_config.repetition_penalty = 1.3
    expected = specdec.AutoregressiveGenerator(target).generate(ids, mask, max_new_tokens=TEXT).sequences
    for name in FEW:
        drafting = generator(target, DRAFTERS[name](short_draft()))
        assert drafting.generate(ids, mask, max_new_tokens=TEXT).sequences.equal(expected)


@pytest.mark.covering(cases=2)
@pytest.mark.filterwarnings("ignore:the draft model")
@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_exact_on_both_sides_of_the_drafts_end(name):
    """The prompt has 3 tokens, the draft 4 positions, the text 6 tokens: rows end with and without drafts.

    In eager rounds, which captured ones equal (`test_captured_rounds_end_drafting_where_eager_ones_do`)."""
    make, rule = SAMPLED[name]

    def drafter(target, draft):
        draft.config.max_position_embeddings = 4
        return make(draft)

    assert p_value(rule=rule, drafter=drafter, rows=2000, calls=1, mode="eager") > 1e-3


def test_a_call_that_may_outgrow_the_draft_is_told_from_where_on():
    drafting = generator(build("llama"), specdec.ModelDrafter(short_draft(), 3))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.warns(UserWarning, match=f"texts of up to {SHORT} tokens only .*plain steps"):
        drafting.generate(ids, max_new_tokens=SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drafting.generate(ids, max_new_tokens=SHORT - 3)


def test_a_draft_in_another_vocabulary_reads_the_last_part_of_a_long_text():
    target = build("llama")
    ids, mask = ragged_prompts(3)
    drafter = specdec.TranslatedDrafter(short_draft(), word_tokenizer(WORDS), word_tokenizer(WORDS), 3)
    out = generator(target, drafter).generate(ids, mask, max_new_tokens=60)
    assert out.sequences.equal(plain(target, ids, mask, 60))
    assert all(proposed > 0 for row in out.stats.rows for proposed in row.proposed[:-1])


# another padding of the vocabulary


def padded(model, rows=6, loud=False):
    """`model` with more tokens; `loud`: these have by far the largest logits, which must be of no consequence."""
    model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[-rows:] = 50 * weight[:rows] if loud else 0.0
    return model


@pytest.mark.covering(cases=2)
@pytest.mark.parametrize(("longer", "mode"), [("draft", "eager"), ("target", "eager"), ("target", "graph")])
@pytest.mark.parametrize("name", FEW)
def test_a_table_with_other_padding_keeps_text_and_acceptance(name, longer, mode):
    models, expected = (("target", build("llama")), ("draft", noisy_copy("llama"))), usual(name, batch=2).pooled
    target, draft = (padded(model) if who == longer else model for who, model in models)
    found = check(target, draft, name, mode, batch=2).stats.pooled
    assert found.acceptance_rate == pytest.approx(expected.acceptance_rate)


@pytest.mark.parametrize("name", FEW)
def test_tokens_that_only_the_drafts_table_has_are_never_drafted(name):
    """They would be its first choice everywhere; the target's text would then be refused token by token."""
    out = check(build("llama"), padded(noisy_copy("llama"), loud=True), name)
    assert out.stats.pooled.acceptance_rate == usual(name).pooled.acceptance_rate > 0


@pytest.mark.parametrize(("name", "mode"), [*((name, "eager") for name in FEW), ("tree", "graph")])
def test_a_target_that_emits_tokens_which_the_draft_lacks_goes_on(name, mode):
    target = padded(build("llama"), loud=True)
    target.generation_config.eos_token_id = None
    out = check(target, noisy_copy("llama"), name, mode)
    assert bool((out.sequences >= VOCAB).any()), "or nothing was tested"


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_a_shorter_table_gives_the_other_tokens_no_probability(name):
    drafts = []

    def recording(draft, scores, noise):
        drafts.append(draft)
        return specdec.acceptance.lossless(draft, scores, noise)

    drafting = generator(padded(build("llama")), DRAFTERS[name](noisy_copy("llama")), rule=recording)
    drafting.generate(torch.tensor([[5, 6, 7]] * 8), max_new_tokens=12, do_sample=True, temperature=3.0, seed=0)
    for draft in drafts:
        assert draft.probs.shape[2] == VOCAB + 6 and not draft.probs[..., VOCAB:].any()
        assert int(draft.tokens[:, 1:].max()) < VOCAB


def test_prompts_with_tokens_that_the_draft_lacks_are_drafted_for():
    target, ids = padded(build("llama")), torch.tensor([[5, VOCAB + 1, VOCAB + 5, 7]])
    out = generator(target, specdec.ModelDrafter(noisy_copy("llama"), 3)).generate(ids, max_new_tokens=12)
    assert out.sequences.equal(plain(target, ids, torch.ones_like(ids), 12))


@pytest.mark.parametrize(("name", "loud"), [*((name, True) for name in SAMPLED), ("chain", False), ("tree", False)])
def test_samples_are_exact_with_a_draft_of_a_longer_table(name, loud):
    """Loud tokens, in captured rounds, with every drafter; quiet ones, in eager rounds, with those that draw."""
    (make, rule), mode = SAMPLED[name], None if loud else "eager"
    assert (
        p_value(rule=rule, drafter=lambda target, draft: make(padded(draft, 3, loud)), rows=2000, calls=1, mode=mode)
        > 1e-3
    )


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.8}, {"typical_p": 0.7}, {"min_p": 0.05}], ids=str)
def test_samples_are_exact_with_a_draft_of_a_shorter_table(options):
    """A draft that lacks the target's last two tokens: q is 0 there, whatever the processors make of -inf."""

    def drafter(target, draft):
        draft.resize_token_embeddings(SMALL - 2)
        return specdec.ModelDrafter(draft, 2)

    assert p_value(drafter=drafter, rows=2000, calls=1, **options) > 1e-3


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_exact_with_any_draft_of_a_shorter_table(name):
    make, rule = SAMPLED[name]

    def drafter(target, draft):
        draft.resize_token_embeddings(SMALL - 2)
        return make(draft)

    assert p_value(rule=rule, drafter=drafter, rows=2000, calls=1) > 1e-3


@pytest.mark.parametrize("sizes", [
    (151936, 152064), (152064, 151936), (50304, 50688), (32000, 32016), (160, 224), (4096, 4160), (256000, 258000),
])  # fmt: skip
def test_sizes_of_one_tokenizer_with_and_without_padding_pass(sizes):
    require_one_vocabulary(*sizes)


@pytest.mark.parametrize(
    "sizes", [(32000, 128256), (128256, 151936), (50257, 51865), (97, 200), (200, 97), (256000, 262144)]
)
def test_other_sizes_are_refused_with_both_numbers(sizes):
    with pytest.raises(ValueError, match=f"got {sizes[0]} tokens for the draft and {sizes[1]}.*TranslatedDrafter"):
        require_one_vocabulary(*sizes)


@pytest.mark.parametrize("make", [specdec.ModelDrafter, specdec.DynamicTreeDrafter])
def test_a_draft_with_another_vocabulary_is_refused(make):
    with pytest.raises(ValueError, match=f"got {VOCAB + 104} tokens for the draft and {VOCAB} for the target"):
        specdec.SpeculativeGenerator(build("llama"), make(padded(build("llama"), 104)))


def test_more_children_than_the_drafts_tokens_are_refused():
    drafter = specdec.ModelDrafter(build("llama"), tree=TokenTree.from_widths((VOCAB + 1,)))
    with pytest.raises(ValueError, match=f"the vocabulary has {VOCAB}"):
        specdec.SpeculativeGenerator(padded(build("llama")), drafter)
