"""What holds for every drafter: the text is the target's own, no row depends on another, no page stays taken."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import LogitsProcessor

import specdec
from specdec import TokenTree
from specdec.acceptance.base import Acceptance
from specdec.drafters.paths import paths_of
from specdec.planning.policy import DRAFTERS_OWN, PLAIN
from tests.attention.hf.test_twin import state_of
from tests.families import CONFIGS, build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS, RULES, TREE, kind_of, require_free, speculative
from tests.specdec.generation.test_generators import p_value

WIDTH = 21  # of the padded prompts
every_drafter = pytest.mark.parametrize("name", DRAFTERS)


@cache
def own_text(family="llama", batch=4, tokens=24, ends=()):
    """The target's own greedy text, by transformers."""
    model, (ids, mask) = build(family), ragged_prompts(batch)
    model.generation_config.eos_token_id = list(ends) or model.generation_config.eos_token_id
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)


def check_greedy(family, name, batch):
    generator = speculative(name, family)
    out = generator.generate(*ragged_prompts(batch), max_new_tokens=24)
    assert out.sequences.equal(own_text(family, batch))
    require_free(generator)
    return out.stats.pooled


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("mistral", 8)])  # whose window is shorter than the text
@every_drafter
def test_greedy_text_is_the_targets_own(name, family, batch):
    """Token for token that of transformers; afterwards no cache holds a page. Families and batches are paired: llama's
    ragged batches meet transformers' text in the tests of ends and failures."""
    stats = check_greedy(family, name, batch)
    assert batch == 1 or 0 < stats.acceptance_rate < 1, "drafts must be right now and then, and wrong too"


@pytest.mark.parametrize("name", ["tree", "dynamic tree", "early exit, tree"])
@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"llama", "mistral"}))
def test_greedy_text_with_trees_is_the_targets_own_on_every_family(family, name):
    check_greedy(family, name, 3)


@every_drafter
def test_a_seed_repeats_a_run_and_another_one_does_not(name):
    generator, prompts = speculative(name), ragged_prompts(2)
    run = lambda seed: generator.generate(*prompts, max_new_tokens=8, do_sample=True, seed=seed).sequences
    first = run(9)
    assert run(9).equal(first) and not run(8).equal(first)


@pytest.mark.covering(cases=6)
@every_drafter
def test_a_row_depends_on_no_other_row(name):
    """Sampled: a row is the same alone, and among rows with other prompts, of which some end early."""
    ids, mask = ragged_prompts(4)
    generator = speculative(name)
    generator.target.model.generation_config.eos_token_id = list(range(3, 12))
    options = dict(max_new_tokens=10, do_sample=True, temperature=0.6, top_k=20, seed=5)
    together, alone = generator.generate(ids, mask, **options), generator.generate(ids[:1], mask[:1], **options)
    assert len(set(together.lengths.tolist())) > 1, "rows must end at different times"
    other = torch.cat([ids[:1].flip(1), ids[1:]])
    changed = generator.generate(other, mask, **options)
    for row, run, place in ((0, alone, 0), (1, changed, 1), (2, changed, 2), (3, changed, 3)):
        length = int(together.lengths[row])
        assert int(run.lengths[place]) == length
        assert run.sequences[place, WIDTH : WIDTH + length].equal(together.sequences[row, WIDTH : WIDTH + length])
    assert not changed.sequences[0, WIDTH:].equal(together.sequences[0, WIDTH:])


class Script:
    """A policy and a rule in one, of rounds that draft, that draft and accept nothing, and plain steps, in turns.

    The rule emits the target's most likely tokens, so that the text is always the same."""

    step_seconds, few_shapes = None, False

    def __init__(self, rounds, max_tokens):
        self._rounds, self._done, self.max_tokens = rounds, 0, max_tokens

    def next(self):
        self._now = self._rounds[self._done % len(self._rounds)]
        self._done += 1
        return PLAIN if self._now == "plain" else DRAFTERS_OWN

    def enter(self, place):
        pass

    def observe(self, shape, seconds, ranks, tokens):
        pass

    def finish(self, rounds, tokens):
        pass

    def __call__(self, draft, scores, noise):
        if self._now != "refuse":
            return specdec.greedy(draft, scores, noise)
        root = torch.zeros(len(scores), dtype=torch.int64)
        return Acceptance.at(draft, root, scores[:, 0].argmax(-1))


def first_guess(draft, row):
    """The distribution of the first token, or where tokens were chosen all paths of the draft of `row`."""
    if draft.probs is not None:
        return draft.probs[row, 0]
    paths, depths, exists = (x[row].tolist() for x in paths_of(draft))
    return {tuple(path[:depth]) for path, depth, there in zip(paths, depths, exists, strict=True) if there}


def watched(drafter, guesses):
    """`drafter`, whose guesses are written to `guesses[row, length of its text]`."""
    start = drafter.start

    def start_watched(rows, max_tokens):
        session = start(rows, max_tokens)

        def propose(batch, tree):
            draft = session.propose(batch, tree)
            guesses.update({(m.number, m.length): first_guess(draft, row) for row, m in enumerate(batch.members)})
            return draft

        names = ("states", "reads", "min_length", "admit", "commit", "release")
        return SimpleNamespace(propose=propose, **{name: getattr(session, name) for name in names})

    drafter.start = start_watched
    return drafter


def guesses_of(name, rounds, do_sample, ids, mask, tokens):
    """All guesses of a new drafter and a new target in a call with these rounds, and its text."""
    generator, guesses = speculative(name), {}
    generator.target.model.generation_config.eos_token_id = None
    script = Script(rounds, generator.drafter.traits.max_tokens)
    watched(generator.drafter, guesses)
    generator = specdec.SpeculativeGenerator(generator.target, generator.drafter, rule=script)
    generator._policy = lambda request, rule: script
    text = generator.generate(ids, mask, max_new_tokens=tokens, do_sample=do_sample, seed=0).sequences
    return guesses, text, generator.drafter.traits


@pytest.mark.covering
@pytest.mark.parametrize("do_sample", [False, True])
@every_drafter
def test_what_a_drafter_remembers_is_what_a_new_one_would_know(name, do_sample):
    """After rounds without a draft and after wholly refused ones: its next guess is that of a drafter made anew.

    The new one sees the text so far as its prompt. One that reads the target's hidden states needs a plain step first,
    and gets the text without its last token."""
    ids, mask = ragged_prompts(4)
    rounds = ("draft", "draft", "refuse", "draft", "plain", "draft", "plain", "plain", "refuse", "refuse", "plain")
    guesses, text, traits = guesses_of(name, rounds, do_sample, ids, mask, 16)
    lag = int(traits.features is not None)
    starts = WIDTH - mask.sum(1)
    places = sorted((row, length) for row, length in guesses if length > mask[row].sum())
    assert len(places) > 10
    texts = [text[row, starts[row] : starts[row] + length - lag] for row, length in places]
    anew = torch.stack([torch.nn.functional.pad(x, (text.shape[1] - len(x), 0), value=1) for x in texts])
    present = torch.stack([torch.arange(text.shape[1]) >= text.shape[1] - len(x) for x in texts]).long()
    found, _, _ = guesses_of(name, ("plain", "draft")[1 - lag :], do_sample, anew, present, 1 + lag)
    for number, (row, length) in enumerate(places):
        remembered, known = guesses[row, length], found[number, length]
        if isinstance(known, set):
            assert remembered == known, f"row {row} at {length} tokens"
        else:
            torch.testing.assert_close(remembered, known)


@every_drafter
def test_a_call_that_fails_gives_all_pages_back_and_the_next_one_is_right(name):
    """A criterion that raises in the middle of a text."""

    def raises(ids, scores):
        if ids.shape[1] > WIDTH + 3:
            raise ArithmeticError("planted")
        return False

    generator, prompts = speculative(name), ragged_prompts(4)
    with pytest.raises(RuntimeError, match="planted"):
        generator.generate(*prompts, max_new_tokens=24, stopping_criteria=[raises])
    require_free(generator)
    assert generator.generate(*prompts, max_new_tokens=8).sequences.equal(own_text(tokens=8))


@pytest.mark.covering(cases=8)
@every_drafter
def test_a_row_ends_at_its_limit_or_at_the_first_end_token(name):
    """Greedy as transformers does; samples hold no end token before their last one."""
    generator, prompts, text = speculative(name), ragged_prompts(4), own_text()[:, WIDTH:]
    config = generator.target.model.generation_config
    for tokens in (1, 2):
        out = generator.generate(*prompts, max_new_tokens=tokens)
        assert out.sequences.equal(own_text()[:, : WIDTH + tokens]) and out.lengths.tolist() == [tokens] * 4
    ends = config.eos_token_id = [int(text[0, 3]), int(text[2, 6])]
    out = generator.generate(*prompts, max_new_tokens=12)
    assert out.sequences.equal(own_text(tokens=12, ends=tuple(ends)))
    sampled = generator.generate(*prompts, max_new_tokens=12, do_sample=True, top_k=3, seed=2)
    for result in (out, sampled):
        for row, length in zip(result.sequences[:, WIDTH:].tolist(), result.lengths.tolist(), strict=True):
            assert not set(row[: length - 1]) & set(ends) and (length == 12 or row[length - 1] in ends)
            assert set(row[length:]) <= {config.pad_token_id}
        assert [sum(row.emitted) for row in result.stats.rows] == result.lengths.tolist()
        assert 0 < min(result.lengths) < 12


@pytest.mark.covering(cases=8)
@every_drafter
def test_a_drafter_takes_the_shapes_that_its_traits_name_and_refuses_others(name):
    plain, prompts = speculative(name), ragged_prompts(3)
    traits = plain.drafter.traits
    for tree in (TokenTree.chain(3), TREE, TokenTree.from_widths((2, 2)), TokenTree.chain(6), "auto"):
        make = lambda tree=tree: specdec.SpeculativeGenerator(plain.target, plain.drafter, tree=tree)
        if tree != "auto" and (
            traits.shapes in ("own", "grown")
            or (traits.shapes == "chain" and not tree.is_chain)
            or (traits.max_depth is not None and tree.max_depth > traits.max_depth)
        ):
            with pytest.raises(ValueError, match=f"{type(plain.drafter).__name__}.* cannot draft (the|a) tree"):
                make()
            continue
        out = make().generate(*prompts, max_new_tokens=8)
        assert out.sequences.equal(own_text("llama", 3, 8))
        if tree != "auto":
            asked = f"chain {tree.size - 1}" if tree.is_chain else f"tree {tree.size} x {tree.max_depth}"
            others = {"plain"} if traits.features else set()
            if name == "confident chain":
                others = {f"chain {length}" for length in range(1, tree.size)}
            assert set(out.stats.pooled.shapes) <= {asked} | others


class NoRepeat(LogitsProcessor):
    """Bans the last two tokens: needs every node's own prefix."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:], float("-inf"))


@pytest.mark.covering(cases=6)
@every_drafter
def test_processors_see_each_nodes_own_prefix(name):
    generator, prompts = speculative(name), ragged_prompts(3)
    options = dict(max_new_tokens=12, logits_processor=LogitsProcessorList([NoRepeat()]))
    plain = specdec.AutoregressiveGenerator(generator.target).generate(*prompts, **options)
    assert generator.generate(*prompts, **options).sequences.equal(plain.sequences)


@pytest.mark.covering(cases=4)
@every_drafter
def test_the_users_models_stay_as_they_are(name):
    """Every module, hook and setting of the target and of the draft model."""
    target, draft = build("llama"), noisy_copy("llama")
    before = state_of(target), state_of(draft)
    generator = specdec.SpeculativeGenerator(target, DRAFTERS[name](target, draft))
    generator.generate(*ragged_prompts(2), max_new_tokens=6)
    assert (state_of(target), state_of(draft)) == before


@pytest.mark.covering(cases=4)
@every_drafter
def test_two_drafters_merge_if_both_choose_their_tokens(name):
    """With greedy text the target's own; where tokens were drawn, merging is refused."""
    kinds, model, prompts = set(), build("llama"), ragged_prompts(3)

    def watching(draft, scores, noise):
        kinds.add(kind_of(draft))
        return specdec.lossless(draft, scores, noise)

    drafter = DRAFTERS[name](model, noisy_copy("llama"))
    alone = specdec.SpeculativeGenerator(model, drafter, rule=watching)
    alone.generate(*prompts, max_new_tokens=4, do_sample=True, seed=0)
    draws = any("drawn" in kind for kind in kinds)
    merged = specdec.SpeculativeGenerator(
        alone.target, specdec.MergedDrafter(drafter, specdec.PromptLookupDrafter(2, 2))
    )
    if name != "synthetic":  # which draws its tokens in greedy decoding too
        assert merged.generate(*prompts, max_new_tokens=12).sequences.equal(own_text("llama", 3, 12))
    if draws:
        with pytest.raises(ValueError, match="sample=False"):
            merged.generate(*prompts, max_new_tokens=4, do_sample=True)
    else:
        assert merged.generate(*prompts, max_new_tokens=4, do_sample=True).stats.lossless
    require_free(merged)


@pytest.mark.covering(cases=9)
@every_drafter
def test_samples_have_the_targets_distribution(name):
    """Chi-square over all texts of three tokens, in eager rounds; the prompt repeats itself, for who looks for that."""
    options = dict(layers=2, rows=2000, calls=1, prompt=(1, 4, 2, 3, 1, 4), mode="eager")
    assert p_value(drafter=DRAFTERS[name], **options) > 1e-3


@pytest.mark.covering
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"lossless", "rejection"}))  # these two are tested above
@pytest.mark.parametrize("name", ["chain", "confident chain"])
def test_samples_of_chains_have_the_targets_distribution_with_every_rule(name, rule):
    if "drawn chain" in RULES[rule].takes and RULES[rule].samples:
        assert p_value(rule=RULES[rule].rule, drafter=DRAFTERS[name], layers=2, calls=1, mode="eager") > 1e-3
