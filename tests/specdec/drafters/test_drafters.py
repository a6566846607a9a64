"""What each drafter promises beyond what holds for all of them (test_every_drafter.py), and what the loop refuses."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import specdec
from attention import UnsupportedArchitecture
from specdec import TokenTree
from specdec.acceptance import rejection
from specdec.drafters.early_exit import first_layers
from specdec.drafters.lookup import find_matches
from specdec.drafters.paths import merge_paths, paths_of
from specdec.drafters.vocabulary import shared_tokens
from specdec.planning.theory import expected_tokens_per_round
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from tests.families import CONFIGS, VOCAB, build, noisy_copy, ragged_prompts
from tests.matrix import CHAINS, RULES, WIDE, renumbered, word_tokenizer, words
from tests.specdec.generation.test_generators import PAIR, p_value

WORDS = words(VOCAB)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"temperature": 0.6, "top_p": 0.8}], ids=str)
def test_trees_wider_than_what_top_k_leaves_stay_exact(options):
    """With two tokens left a third child does not exist."""
    drafter = lambda target, draft: specdec.ModelDrafter(draft, tree=TokenTree.from_widths((3, 1)))
    assert p_value(drafter=drafter, calls=2, **options) > 1e-3


def test_auto_samples_have_the_targets_distribution():
    assert p_value(drafter=lambda target, draft: specdec.ModelDrafter(draft, 2), tree="auto", calls=2, length=4) > 1e-3


# the synthetic drafter


@pytest.mark.parametrize(("acceptance", "tokens"), [(1.0, 5.0), (0.0, 1.0)])
def test_an_acceptance_of_one_or_zero_accepts_all_or_nothing(acceptance, tokens):
    model = build("llama")
    out = specdec.SpeculativeGenerator(model, specdec.SyntheticDrafter(copy.deepcopy(model), acceptance, 4)).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=40
    )
    stats = out.stats.pooled
    assert stats.tokens_per_round == tokens and set(stats.accepted) == {round(tokens - 1)}


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_synthetic_drafter_is_right_as_often_as_it_says_and_tokens_per_round_follow_theory(do_sample):
    model, alpha, length = build("llama"), 0.7, 4
    generator = specdec.SpeculativeGenerator(model, specdec.SyntheticDrafter(copy.deepcopy(model), alpha, length))
    ids = torch.randint(3, VOCAB, (24, 6), generator=torch.Generator().manual_seed(0))
    stats = generator.generate(ids, max_new_tokens=90, do_sample=do_sample, seed=4).stats.pooled
    successes, trials = (sum(x) for x in zip(*(stats.trials(i) for i in range(1, length + 1)), strict=True))
    assert trials > 1000 and abs(successes / trials - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / trials)
    whole = [
        e for e, d in zip(stats.emitted, stats.depths, strict=True) if d == length
    ]  # rounds that no row's end cuts
    expected = expected_tokens_per_round(alpha, length)
    spread = math.sqrt(sum((e - expected) ** 2 for e in whole) / len(whole) / len(whole))
    assert sum(whole) / len(whole) == pytest.approx(expected, abs=4 * spread)


@pytest.mark.parametrize("acceptance", [-0.1, 1.1, float("nan")])
def test_an_acceptance_outside_its_range_is_refused(acceptance):
    with pytest.raises(ValueError, match="acceptance must lie"):
        specdec.SyntheticDrafter(build("llama"), acceptance)


# confidence


def test_an_unsure_token_ends_the_chain_and_is_still_put_to_the_test():
    drafts = []

    def recording(draft, scores, noise):
        drafts.append(draft)
        return rejection(draft, scores, noise)

    generator = specdec.SpeculativeGenerator(
        PAIR.target, specdec.ModelDrafter(PAIR.draft, 6, confidence=0.6), rule=recording
    )
    ids = PAIR.tokenizer(["def add(a, b):", "import os"], return_tensors="pt", padding=True)
    out = generator.generate(ids.input_ids, ids.attention_mask, max_new_tokens=40, do_sample=True, seed=0)
    lengths = set()
    for draft in drafts:
        chosen = draft.probs.gather(2, draft.tokens[:, 1:, None])[..., 0]
        for row in range(len(chosen)):
            there = draft.valid[row, 1:].tolist()
            count = sum(there)
            assert there == [True] * count + [False] * (len(there) - count) and count >= 1
            assert bool((chosen[row, : count - 1] >= 0.6).all())
            assert count == 6 or count == len(there) or float(chosen[row, count - 1]) < 0.6
            lengths.add(count)
    assert len(lengths) > 2 and out.stats.pooled.acceptance_rate > 0.5


# dynamic trees


def test_a_dynamic_tree_holds_the_likeliest_nodes_of_what_it_expands():
    """Against a plain beam expansion in Python with the model's own forward."""
    model = build("llama", spread=1.5)
    drafts = []

    def recording(draft, scores, noise):
        drafts.append(draft)
        return specdec.greedy(draft, scores, noise)

    nodes, depth, width, prompt = 8, 3, 3, [5, 9, 11, 40]
    generator = specdec.SpeculativeGenerator(
        build("llama", seed=3), specdec.DynamicTreeDrafter(model, nodes, depth, width), rule=recording
    )
    generator.generate(torch.tensor([prompt]), max_new_tokens=1)
    found, level = {}, {(): 0.0}
    with torch.no_grad():
        for _ in range(depth):
            below = {}
            for path, value in level.items():
                log_p = model(torch.tensor([[*prompt, *path]])).logits[0, -1].log_softmax(-1)
                for p, token in zip(*(x.tolist() for x in log_p.topk(width)), strict=True):
                    below[*path, token] = value + p
            found |= below
            level = dict(sorted(below.items(), key=lambda item: -item[1])[:width])
    best = set(sorted(found, key=lambda path: -found[path])[:nodes])
    draft = drafts[0]
    draft.tree.check()
    paths, depths, exists = (x[0].tolist() for x in paths_of(draft))
    assert all(exists) and {tuple(path[:d]) for path, d in zip(paths, depths, strict=True)} == best


@pytest.mark.parametrize("numbers", [(0, 3, 3), (4, 0, 3), (4, 3, 0), (13, 2, 3)])
def test_a_dynamic_tree_that_cannot_be_is_refused(numbers):
    with pytest.raises(ValueError, match=str(numbers[0])):
        specdec.DynamicTreeDrafter(build("llama"), *numbers)


# prompt lookup and merged paths


def matches_by_hand(text, candidates, max_ngram, min_ngram):
    found = []
    for end in range(len(text) - 1):
        n = 0
        while n < max_ngram and n <= end and text[end - n] == text[-1 - n]:
            n += 1
        if n >= min_ngram:
            found.append((-n, -end))
    return [-end for _, end in sorted(found)[:candidates]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_matches_equal_a_search_by_hand(texts, candidates, max_ngram, min_ngram):
    max_ngram = max(max_ngram, min_ngram)
    longest = max(map(len, texts))
    padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    ends, found = find_matches(padded, torch.tensor([[len(text)] for text in texts]), candidates, max_ngram, min_ngram)
    assert ends.shape == found.shape == (len(texts), candidates)
    for text, row_ends, row_found in zip(texts, ends.tolist(), found.tolist(), strict=True):
        assert [end for end, there in zip(row_ends, row_found, strict=True) if there] == matches_by_hand(
            text, candidates, max_ngram, min_ngram
        )


def test_a_longer_match_comes_before_a_later_one():
    """2 3 at the end: it was there at 1, and a 3 alone at 5."""
    text = torch.tensor([[9, 2, 3, 9, 9, 3, 8, 2, 3]])
    assert find_matches(text, torch.tensor([[9]]), 2, 3, 1)[0].tolist() == [[2, 5]]
    assert (
        specdec.PromptLookupDrafter(3, 2).traits.max_tokens == 6
        and specdec.PromptLookupDrafter(3, 2, num_tokens=4).traits.max_tokens == 4
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_a_lookup_proposes_what_followed_the_matches_up_to_the_end_of_each_text(texts, length, candidates, budget):
    """Behind the end of a shorter text lie 7s, which must not be read."""
    longest = max(map(len, texts))
    padded, lengths = (
        torch.tensor([text + [7] * (longest - len(text)) for text in texts]),
        torch.tensor([[len(text)] for text in texts]),
    )
    drafter = specdec.PromptLookupDrafter(length, candidates, 3, 1, budget)
    draft = drafter.propose(SimpleNamespace(size=len(texts), text=lambda: (padded, lengths)))
    for text, tokens, paths, depths, there in zip(texts, draft.tokens, *paths_of(draft), strict=True):
        followed = [text[end + 1 : end + 1 + length] for end in matches_by_hand(text, candidates, 3, 1)]
        wanted = list(dict.fromkeys(tuple(line[: d + 1]) for line in followed for d in range(len(line))))[:budget]
        assert [
            tuple(path[:depth])
            for path, depth, one in zip(paths.tolist(), depths.tolist(), there.tolist(), strict=True)
            if one
        ] == wanted
        assert tokens[0] == text[-1]


def test_what_a_lookup_does_unless_told_otherwise():
    plain = specdec.PromptLookupDrafter()
    assert (plain.length, plain.candidates, plain.max_ngram, plain.min_ngram, plain.traits.max_tokens) == (
        8,
        3,
        3,
        1,
        24,
    )
    assert plain.traits.captured and plain.traits.own_depth == 8
    assert specdec.PromptLookupDrafter(3, 2, 3, 2, num_tokens=4).traits.max_tokens == 4, "none need be 1"
    assert specdec.PromptLookupDrafter(1, 1, 1, 1, num_tokens=1).traits.max_tokens == 1, (
        "the least there can be of each"
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=4), st.integers(1, 12))
def test_merged_paths_are_the_set_of_all_beginnings_the_first_ones_first(chains, budget):
    deepest = 4
    nodes = [chain[: d + 1] for chain in chains for d in range(deepest)]
    paths = torch.tensor([[*(n[:deepest]), *[7] * (deepest - len(n[:deepest]))] for n in nodes])[None]
    depths = torch.tensor([[d + 1 for _ in chains for d in range(deepest)]])
    exists = torch.tensor([[d < len(chain) for chain in chains for d in range(deepest)]])
    draft = merge_paths(torch.tensor([[9]]), paths, depths, exists, budget, len(chains))
    draft.tree.check()
    wanted = list(dict.fromkeys(tuple(chain[: d + 1]) for chain in chains for d in range(len(chain))))[:budget]
    merged, merged_depths, there = (x[0].tolist() for x in paths_of(draft))
    assert [tuple(p[:d]) for p, d, t in zip(merged, merged_depths, there, strict=True) if t] == wanted
    assert draft.tokens[0, 0] == 9 and draft.tree.size == budget + 1


def test_prompt_lookup_copies_what_came_before():
    """A target that repeats itself: once the loop has been seen, whole continuations are right."""
    out = specdec.SpeculativeGenerator(PAIR.target, specdec.PromptLookupDrafter(6, 2)).generate(
        PAIR.tokenizer("x = 1\nx = 1\nx = 1\nx = 1\nx =", return_tensors="pt").input_ids, max_new_tokens=60
    )
    assert out.stats.pooled.tokens_per_round > 2


def test_rows_without_a_match_propose_nothing():
    model = build("llama")
    out = specdec.SpeculativeGenerator(model, specdec.PromptLookupDrafter(4, 2, min_ngram=2)).generate(
        torch.tensor([[5, 6, 7, 8]]), max_new_tokens=2
    )
    assert out.stats.pooled.proposed[0] == 0 and out.stats.pooled.emitted[0] == 1


@pytest.mark.parametrize(
    "numbers", [{"length": 0}, {"candidates": 0}, {"min_ngram": 0}, {"max_ngram": 1, "min_ngram": 2}, {"num_tokens": 0}]
)
def test_a_lookup_that_cannot_be_is_refused(numbers):
    with pytest.raises(ValueError, match="length"):
        specdec.PromptLookupDrafter(**numbers)


# early exit


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_first_layers_share_every_weight_and_leave_the_model_alone(family):
    model = build(family)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    short = first_layers(model, 2)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in short.parameters()) and sum(1 for _ in short.parameters()) < sum(
        1 for _ in model.parameters()
    )
    specdec.ModelRunner(short)  # its comparison with the plain forward
    assert torch.equal(model(ids).logits, before) and model.config.num_hidden_layers == 3


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_a_number_of_layers_that_leaves_nothing_is_refused(layers):
    with pytest.raises(ValueError, match=f"got {layers}"):
        specdec.EarlyExitDrafter(build("llama"), layers)


def test_early_exit_needs_layers_to_leave_behind():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has 1 layer, so there are no first ones"):
        specdec.EarlyExitDrafter(LlamaForCausalLM(config).eval(), 1)
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4)
    with pytest.raises(UnsupportedArchitecture, match="BloomForCausalLM"):
        specdec.EarlyExitDrafter(BloomForCausalLM(config).eval(), 1)


def test_early_exit_belongs_to_its_own_target():
    with pytest.raises(ValueError, match="not the generator's target"):
        specdec.SpeculativeGenerator(build("llama"), specdec.EarlyExitDrafter(build("llama"), 1))


def test_a_target_whose_late_layers_do_nothing_is_drafted_perfectly():
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    out = specdec.SpeculativeGenerator(model, specdec.EarlyExitDrafter(model, 1, 3)).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=40
    )
    assert out.stats.pooled.acceptance_rate == 1 and set(out.stats.pooled.emitted[:-1]) == {4}


# another tokenizer


def test_shared_tokens_pair_by_text():
    assert shared_tokens(word_tokenizer(["<unk>", "a", "b", "c"]), word_tokenizer(["<unk>", "c", "d", "a"])) == [
        (0, 0),
        (1, 3),
        (3, 1),
    ]


def test_vocabularies_with_nothing_in_common_are_refused():
    ours, theirs = (
        PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(["a", "b"])._tokenizer),
        word_tokenizer(["c", "d"]),
    )
    with pytest.raises(ValueError, match="no token in common"):
        specdec.TranslatedDrafter(build("llama"), ours, theirs)


def test_a_twin_under_other_numbers_drafts_as_well_as_the_twin_itself():
    """The draft's weights are permuted with its vocabulary, so it is the target."""
    target, (draft, order) = build("llama"), renumbered(build("llama"), seed=1)
    drafter = specdec.TranslatedDrafter(draft, word_tokenizer(WORDS), word_tokenizer([WORDS[i] for i in order]), 3)
    out = specdec.SpeculativeGenerator(target, drafter).generate(
        torch.tensor([[5, 6, 7], [8, 9, 10]]), max_new_tokens=30
    )
    assert out.stats.pooled.acceptance_rate == 1


# what the loop refuses


class Broken:
    """A drafter that proposes what it is told to."""

    traits = specdec.DrafterTraits(2)

    def __init__(self, change):
        self._change = change

    def validate(self, target):
        pass

    def start(self, rows, max_tokens):
        return specdec.StatelessSession(self.propose)

    def propose(self, batch, tree=None):
        root = batch.last_tokens()
        draft = Draft(TokenTree.chain(2), root.expand(-1, 3).clone(), torch.full((batch.size, 2, VOCAB), 1 / VOCAB))
        return self._change(draft)


def spoil(**changes):
    def change(draft):
        for name, value in changes.items():
            getattr(draft, name)[0, 1] = value
        return draft

    return change


@pytest.mark.parametrize(("change", "said"), [
    (spoil(tokens=VOCAB), f"outside the target's vocabulary of {VOCAB}"),
    (spoil(tokens=-1), f"outside the target's vocabulary of {VOCAB}"),
    (spoil(probs=0.5), "do not sum to 1"),
    (spoil(probs=float("nan")), "NaN"),
    (lambda draft: Draft(draft.tree, draft.tokens, draft.probs[..., :5]), "over 5 tokens"),
])  # fmt: skip
def test_a_broken_draft_is_reported_and_nothing_stays_taken(change, said):
    generator = specdec.SpeculativeGenerator(build("llama"), Broken(change))
    with pytest.raises(ValueError, match=said):
        generator.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=True)
    assert generator.target.cache.sequences == ()


def test_rows_of_a_tree_batch_that_are_no_trees_are_named():
    for parents, said in (([[-1, 0, 2]], "node 2"), ([[-1, -1, 1]], "node 2"), ([[-1, 0, 1]], "depth 2")):
        with pytest.raises(ValueError, match=said):
            TreeBatch(torch.tensor(parents), 1, 3).check()


@pytest.mark.parametrize("tree", [TokenTree.chain(1100), "automatic", 3])
def test_a_shape_that_cannot_be_drafted_is_refused(tree):
    with pytest.raises(ValueError, match="1024|tree is a TokenTree"):
        specdec.SpeculativeGenerator(build("llama"), specdec.ModelDrafter(noisy_copy("llama")), tree=tree)


@pytest.mark.parametrize(
    "options",
    [
        {"confidence": 0.0},
        {"confidence": 1.5},
        {"confidence": 0.5, "tree": WIDE},
        {"tree": TokenTree.chain(0)},
    ],
)
def test_a_model_drafter_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="confidence|node below the root"):
        specdec.ModelDrafter(build("llama"), **options)


# what a first reader broke


def test_a_draft_whose_text_outgrows_its_room_goes_on_with_the_last_part():
    """A target token of eight letters is eight tokens of a draft that spells."""
    letters = ["<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    spelling = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate([*letters, *WORDS[1:9]])}, [], unk_token="<unk>")
    )
    words = ["<unk>", *(letters[1 + i % 26] * 8 for i in range(1, VOCAB - 1)), "a"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, unk_token="<unk>")
    target = build("llama")
    ids, mask = ragged_prompts(3)
    expected = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    drafter = specdec.TranslatedDrafter(
        noisy_copy("llama"), word_tokenizer(list(dict.fromkeys([*words, *WORDS]))[:VOCAB]), tokenizer, 3
    )
    assert (
        specdec.SpeculativeGenerator(target, drafter).generate(ids, mask, max_new_tokens=24).sequences.equal(expected)
    )


GOES_WITH_TREES = {"tree drawn without replacement": True, "chosen tree": False}  # kind of draft: drawn at random


@pytest.mark.parametrize(("rule", "sample"), [
    (name, sample) for name, case in RULES.items() for kind, sample in GOES_WITH_TREES.items()
    if case.samples and (kind in case.takes or sample and case.takes == CHAINS)
])  # fmt: skip
def test_any_rule_goes_with_auto(rule, sample):
    """Rules for chains are given chains only."""
    drafter = specdec.ModelDrafter(noisy_copy("llama"), tree=WIDE, sample=sample)
    generator = specdec.SpeculativeGenerator(build("llama"), drafter, rule=RULES[rule].rule, tree="auto")
    shapes = generator.generate(
        torch.tensor([[5, 6, 7]] * 4), max_new_tokens=30, do_sample=True, seed=1
    ).stats.pooled.shapes
    assert "plain" in shapes and len(set(shapes)) > 1


@pytest.mark.parametrize("make", [
    lambda model: specdec.ModelDrafter(model, tree=TokenTree.from_widths((98,))),
    lambda model: specdec.EarlyExitDrafter(model, 1, tree=TokenTree.from_widths((98,))),
    lambda model: specdec.DynamicTreeDrafter(model, 98, 1, 98),
])  # fmt: skip
def test_more_children_than_tokens_are_refused(make):
    model = build("llama")
    with pytest.raises(ValueError, match="98 children .* the vocabulary has 97"):
        specdec.SpeculativeGenerator(model, make(model))


@pytest.mark.parametrize(("parents", "depth"), [([-1, 0, 7], 2), ([-1, 0, 1], 1), ([-1, 2, 0], 2), ([-1, -1, 1], 2)])
def test_a_tree_batch_that_is_no_tree_is_reported(parents, depth):
    model = build("llama")
    change = lambda draft: Draft(TreeBatch(torch.tensor([parents]), depth, 2), draft.tokens)
    generator = specdec.SpeculativeGenerator(model, Broken(change))
    with pytest.raises(ValueError, match="parents are not a tree"):
        generator.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8)
    assert generator.target.cache.sequences == ()


def test_an_early_exit_inside_a_small_budget_has_room_for_its_own_tree():
    model = build("llama")
    drafter = specdec.MergedDrafter(
        specdec.EarlyExitDrafter(model, 1, num_tokens=60, sample=False), specdec.PromptLookupDrafter(2, 1), num_tokens=2
    )
    ids, mask = ragged_prompts(1)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=50)
    assert specdec.SpeculativeGenerator(model, drafter).generate(ids, mask, max_new_tokens=50).sequences.equal(expected)


def test_a_warm_auto_generator_still_knows_its_speedup():
    generator = specdec.SpeculativeGenerator(build("llama"), specdec.SyntheticDrafter(build("llama"), 1.0), tree="auto")
    for _ in range(2):
        stats = generator.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=40).stats.pooled
    assert stats.speedup is not None and stats.overhead is not None


def test_acceptance_by_rank_sums_to_one_at_most_whatever_the_trees_were():
    ranks = (((2, 0), (1, 0), (1, 0)), ((2, 1),), ((2, None),), ((1, None),))
    stats = specdec.RoundStats((3,) * 4, (3, 1, 0, 0), (4, 2, 1, 1), (0.1,) * 3, ranks=ranks)
    assert stats.rank_acceptance == pytest.approx(
        (0.5, 0.25)
    )  # first: 3 of 6; second: 1 of 2 where it was there and the first was not taken


class Odd(Broken):
    """A drafter that breaks the protocol in one place."""

    def __init__(self, change=lambda draft: draft, start=None, **traits):
        super().__init__(change)
        self.traits = specdec.DrafterTraits(**{"max_tokens": 2} | traits)
        if start is not None:
            self.start = start


def other_root(draft):
    draft.tokens[:, 0] = (draft.tokens[:, 0] + 1) % VOCAB
    return draft


@pytest.mark.parametrize(("drafter", "error", "said"), [
    (Odd(lambda draft: None), TypeError, "propose must return a specdec.Draft, got a NoneType"),
    (Odd(lambda draft: Draft(draft.tree, draft.tokens[:1])), ValueError, "tokens for 1 rows, the batch has 2"),
    (Odd(max_tokens=1), ValueError, "the draft has 2 tokens, but max_tokens of its drafter is 1"),
    (Odd(other_root), ValueError, "node 0 of the draft is not the last accepted token in row 0"),
    (Odd(start=lambda rows, max_tokens: rows), TypeError, "Odd.start must return a DraftSession.* got a Rows"),
])  # fmt: skip
def test_a_drafter_that_breaks_the_protocol_is_told_where(drafter, error, said):
    generator = specdec.SpeculativeGenerator(build("llama"), drafter)
    with pytest.raises(error, match=said):
        generator.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), max_new_tokens=4)
    assert generator.target.cache.free_pages == generator.target.cache.num_pages


@pytest.mark.parametrize("traits", [
    {"max_tokens": 0}, {"max_depth": 0}, {"own_depth": 0}, {"target_tokens": -1}, {"own_tokens": -1},
    {"shapes": "any"},
])  # fmt: skip
def test_traits_that_cannot_be_are_refused(traits):
    with pytest.raises(ValueError, match="must be"):
        specdec.DrafterTraits(**{"max_tokens": 2} | traits)


def test_a_merged_drafter_reports_a_part_that_is_deeper_than_its_traits_say():
    deep = Odd(own_depth=1)
    deep._change = lambda draft: Draft(draft.tree, draft.tokens)
    drafter = specdec.MergedDrafter(deep, specdec.PromptLookupDrafter(1, 1))
    with pytest.raises(ValueError, match="own_depth is 1, but a draft has 2 levels"):
        specdec.SpeculativeGenerator(build("llama"), drafter).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)


def test_what_a_drafter_lacks_is_named():
    lacking = SimpleNamespace(traits=specdec.DrafterTraits(1), start=None)
    with pytest.raises(TypeError, match="got 'SimpleNamespace', which lacks validate"):
        specdec.SpeculativeGenerator(build("llama"), lacking)


@pytest.mark.parametrize(("rule", "said"), [
    (lambda draft, scores, noise: None, "NoneType"),
    (lambda draft, scores, noise: specdec.Acceptance.of_nothing(draft, draft.tokens[:, :1]), r"\[1, 1\]"),
])  # fmt: skip
def test_a_rule_that_returns_something_else_is_told(rule, said):
    generator = specdec.SpeculativeGenerator(build("llama"), specdec.PromptLookupDrafter(), rule)
    with pytest.raises(TypeError, match=f"must return an Acceptance with next_tokens .*, got {said}"):
        generator.generate(torch.tensor([[5, 6, 5, 6]]), max_new_tokens=4)
