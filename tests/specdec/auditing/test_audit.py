"""`specdec.audit` passes what is lossless, finds every planted bug, and says where it could not have found one."""

from dataclasses import replace

import pytest
import torch

import specdec
from attention import PagedKVCache
from specdec import TokenTree
from specdec.acceptance import Typical, block
from specdec.auditing.control import WrongRule
from specdec.auditing.greedy import THEIRS, Divergence
from specdec.auditing.readings import judge
from specdec.drafters.model import ModelDraftSession
from tests.families import build, noisy_copy, ragged_prompts
from tests.matrix import DRAFTERS
from tests.specdec.drafters.block.test_conditionals import loud_dspark, tell_marginals
from tests.specdec.generation.test_generators import (
    accepts_always,
    recomputes_q_at_another_temperature,
    samples_the_target_after_a_rejection,
    small_model,
)

PROMPT = [1, 4, 2, 3, 1, 4]  # repeats itself, for who looks for that
SETTINGS = dict(samples=1000, tokens=3, batch=1000, mode="eager")
chain = lambda target, draft: specdec.ModelDrafter(draft, 2)


def sampled(drafter=chain, **options):
    """The audit of samples of a model with six tokens."""
    target = small_model(3, 2)
    made = drafter(target, small_model(4))
    return specdec.audit(target, made, [PROMPT], parts=("sampled",), **SETTINGS | options)


def greedy(drafter, model=None, count=3, **options):
    """The audit of greedy texts of a model of 97 tokens."""
    model = build("llama") if model is None else model
    model.generation_config.eos_token_id = None
    prompts = [row[of.bool()] for row, of in zip(*ragged_prompts(count), strict=True)]
    made = drafter(model, noisy_copy("llama"))
    return specdec.audit(model, made, prompts, parts=("greedy",), max_new_tokens=20, mode="eager", **options)


# --- what is lossless passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tree", "DSpark"])
def test_the_librarys_drafters_pass(name):
    """Of `DRAFTERS` a few; all of them were run once, and every test of drafters has its own comparison."""
    samples, texts = sampled(DRAFTERS[name]), greedy(DRAFTERS[name])
    assert samples.verdict == texts.verdict == "passed" and samples.status == 0, f"{samples}\n{texts}"
    assert texts.greedy.identical == {"transformers generate": 3, "plain decoding here": 3}
    assert sum(test.drafted for test in samples.sampled.tests) > 100, "accepted drafts are among what was tested"
    assert all(test.compared.rows == 1000 and test.compared.freedom for test in samples.sampled.tests)


@pytest.mark.parametrize("options", [dict(temperature=1.4, top_k=4, top_p=0.95), dict(repetition_penalty=1.4)])
def test_the_distribution_is_that_after_the_processors(options):
    assert sampled(rule=block, tokens=2, **options).verdict == "passed"


# --- planted bugs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [accepts_always, samples_the_target_after_a_rejection, recomputes_q_at_another_temperature, Typical()]
)
def test_a_wrong_acceptance_rule_is_found(rule):
    found = sampled(rule=rule)
    assert found.verdict == "failed" and found.status == 1
    assert found.sampled.p_value < 1e-6 or any(test.impossible for test in found.sampled.tests)


def second_best(draft, scores, noise):
    """Wrong: also accepts what the target finds second."""
    verdict = specdec.greedy(draft, scores, noise)
    second = (draft.tokens[:, 1:2] == scores[:, 0].topk(2).indices).any(1) & (verdict.counts == 0)
    node = torch.where(second, 1, 0)
    other = specdec.Acceptance.at(draft, node, scores.argmax(-1).gather(1, node[:, None])[:, 0])
    path = torch.where(second[:, None], other.path, verdict.path)
    tokens = torch.where(second, other.next_tokens, verdict.next_tokens)
    return specdec.Acceptance(torch.where(second, other.counts, verdict.counts), path, tokens)


def test_a_wrong_rule_of_greedy_decoding_is_found():
    found = greedy(DRAFTERS["chain"], greedy_rule=second_best)
    assert found.verdict == "failed"
    assert {one.verdict for one in found.greedy.divergences} == {"bug"}
    first = found.greedy.divergences[0]
    assert min(first.judged.behind[0]) > 2 * first.judged.noise and max(first.judged.behind[1]) == 0
    assert f"  {first.position}" in str(found)
    assert "its own prefix" in {one.reference for one in found.greedy.divergences}, "what follows is judged too"


def unmoved(monkeypatch):
    """The keys and values of accepted nodes stay where the draft put them: the first nodes' are kept instead."""
    commit = PagedKVCache.commit
    wrong = lambda cache, live, starts, paths: commit(cache, live, starts, [tuple(range(len(path))) for path in paths])
    monkeypatch.setattr(PagedKVCache, "commit", wrong)


def test_a_wrong_commit_of_keys_and_values_is_found(monkeypatch):
    unmoved(monkeypatch)
    found = greedy(DRAFTERS["tree"])
    assert found.verdict == "failed" and "bug" in str(found)


def changed(monkeypatch, change):
    """Drafts of draft models go through `change` before the target sees them."""
    draft = ModelDraftSession._draft
    monkeypatch.setattr(ModelDraftSession, "_draft", lambda session, batch, tree: change(draft(session, batch, tree)))


def hotter(draft):
    """q at twice the temperature that tokens were drawn at."""
    weights = draft.probs.sqrt()
    return replace(draft, probs=weights / weights.sum(-1, keepdim=True))


def pruned(draft):
    """A drawn token that the draft model found unlikely is dropped, with all after it."""
    q = draft.probs.gather(2, draft.tokens[:, 1:, None])[..., 0]
    kept = (q > 0.4).long().cumprod(1).bool()
    return replace(draft, valid=torch.cat([torch.ones_like(kept[:, :1]), kept], 1))


@pytest.mark.parametrize("bug", [hotter, pruned])
def test_a_draft_that_is_not_what_was_drawn_is_found(bug, monkeypatch):
    changed(monkeypatch, bug)
    found = sampled()
    assert found.verdict == "failed" and found.sampled.control_failed


def test_marginals_reported_as_conditionals_are_found(monkeypatch):
    tell_marginals(monkeypatch)
    assert sampled(lambda target, draft: loud_dspark(target)).verdict == "failed"


def in_bf16(seed):
    """A target in bfloat16 with logits so close that rounding decides now and then."""
    return build("llama", seed).to(torch.bfloat16)


def test_where_rounding_decides_it_is_a_near_tie(monkeypatch):
    """And a bug is a bug in 16 bits too."""
    found = greedy(lambda target, draft: specdec.PromptLookupDrafter(8, 2), in_bf16(0), count=16)
    assert found.verdict == "passed" and found.greedy.divergences, "no near-tie was met: choose other prompts"
    assert {one.verdict for one in found.greedy.divergences} == {"near-tie"}
    unmoved(monkeypatch)
    assert greedy(DRAFTERS["tree"], in_bf16(0)).verdict == "failed"


def test_a_near_tie_is_what_twice_the_noise_explains():
    logits = torch.tensor([[1.0, 0.99, 0.0], [1.0, 1.01, 0.0]])
    assert judge(logits, [0, 1]).near_tie and judge(logits, [0, 1]).margins == pytest.approx((0.01, 0.01))
    assert not judge(logits, [0, 2]).near_tie and not judge(logits, [0, None]).near_tie
    assert not judge(logits, [0, 1], noise=0.001).near_tie


def test_readings_that_differ_by_more_than_rounding_excuse_nothing():
    tie = judge(torch.tensor([[1.0, 0.99, 0.0], [1.0, 1.01, 0.0]]), [0, 1])
    assert Divergence(THEIRS, 0, 3, (0, 1), tie, limit=0.1).verdict == "near-tie"
    assert Divergence(THEIRS, 0, 3, (0, 1), tie, limit=0.001).verdict == "bug"


# --- what could not have been found -----------------------------------------------------------------------------------


def test_an_audit_that_cannot_find_its_control_is_inconclusive():
    """Where the target leaves one token, nothing varies."""
    found = sampled(top_k=1)
    assert found.verdict == "inconclusive" and found.status == 3
    assert found.sampled.wrong_by is None and "no wrong rule can be found" in str(found)


def test_an_audit_without_drafts_is_inconclusive():
    lookup = lambda target, draft: specdec.PromptLookupDrafter(3, 3)
    target = small_model(3, 2)
    one = specdec.audit(target, lookup(target, None), [[1]], **SETTINGS | dict(tokens=1, max_new_tokens=1))
    assert one.greedy.drafted == one.sampled.drafted == 0 and one.verdict == "inconclusive"
    assert "no token was drafted" in str(one)


def test_a_control_is_wrong_by_what_it_says():
    """The share of each token over many draws, and the total variation from the target's."""
    p = torch.tensor([0.5, 0.3, 0.2])
    rows = 20_000
    noise = specdec.sampling.noise.round_noise(0, range(rows), [0] * rows, torch.device("cpu"))
    draft = specdec.Draft(TokenTree.chain(0), torch.zeros(rows, 1, dtype=torch.int64))
    drawn = WrongRule(0.1)(draft, p.log().expand(rows, 1, -1), noise)
    shares = torch.bincount(drawn.next_tokens, minlength=3) / rows
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.24, 0.16]), atol=0.015, rtol=0)
    assert drawn.counts.sum() == 0
    with pytest.raises(ValueError, match="got 0"):
        WrongRule(0)


# --- input and output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [(dict(samples=0), "samples must be an integer of at least 1, got 0"), (dict(samples=10), "at least 64, got 10"),
     (dict(level=2.0), "level must lie in .0, 1., got 2.0"), (dict(parts=("gready",)), "got .'gready'"),
     (dict(prompts=[]), "at least one prompt"), (dict(tokens=1.5), "tokens .* got 1.5"),
     (dict(do_sample=True), "audit sets do_sample itself")],
)  # fmt: skip
def test_what_cannot_be_used_is_named(options, said):
    target = small_model(3)
    arguments = dict(prompts=[PROMPT]) | options
    with pytest.raises((ValueError, TypeError), match=said):
        specdec.audit(target, specdec.ModelDrafter(small_model(4), 2), **arguments)
    with pytest.raises(ValueError, match="needs a drafter"):
        specdec.audit(target, None, [PROMPT])
