"""What holds for every acceptance rule, with every kind of draft that it takes."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

import specdec
from specdec.acceptance import Typical, block, greedy, lossless, rejection, tree_distinct, tree_exact, tree_iid
from specdec.acceptance.base import is_built_in, reads_unwritten
from specdec.sampling.draws import draw
from specdec.sampling.noise import Stream, round_noise
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree
from tests.families import ragged_prompts
from tests.matrix import CHAINS, DRAFTERS, DRAFTS, DRAWN_CHAINS, RULES, kind_of, require_free, speculative
from tests.specdec.acceptance.test_acceptance import CPU, Chosen

VOCAB = 4
PAIRS = [(name, kind) for name, case in RULES.items() for kind in sorted(case.takes)]
SAMPLING = [name for name, case in RULES.items() if case.samples]


def problem(kind, rows, seed=0):
    """`draft`, the target's `scores [B, N, V]` after each of its nodes and `noise`, rows of round 0."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(1 + VOCAB + VOCAB**2, VOCAB, generator=generator)  # after nothing, one token, two tokens
    q = torch.randn(VOCAB, generator=generator).softmax(-1).expand(rows, -1)
    noise = round_noise(seed, range(rows), [0] * rows, CPU)
    draft = DRAFTS[kind](q, noise)
    return draft, scores_of(p, draft), noise, p


def scores_of(p, draft):
    """The scores after each node's own path; nodes that a row lacks get some."""
    tables, count = draft.tables, len(draft.tokens)
    path, depth = tables.path.expand(count, -1, -1), tables.depth.expand(count, -1)
    tokens = draft.tokens.gather(1, path.flatten(1)).view(path.shape)
    history = torch.zeros_like(draft.tokens)
    for level in range(path.shape[2]):
        history = torch.where(depth > level, history * VOCAB + tokens[..., level] + 1, history)
    return p[history]


def alone(draft, rows):
    """The draft of some rows."""
    tree = draft.tree
    if isinstance(tree, TreeBatch):
        tree = TreeBatch(tree.parents[rows], tree.max_depth, tree.max_children)
    probs, valid = (None if x is None else x[rows] for x in (draft.probs, draft.valid))
    return replace(draft, tree=tree, tokens=draft.tokens[rows], probs=probs, valid=valid)


FIELDS = ("counts", "path", "next_tokens")


def same(verdict, expected):
    return all(getattr(verdict, field).equal(getattr(expected, field)) for field in FIELDS)


def what_does_not_fit(name, kind):
    """The word of the message with which a rule refuses a draft."""
    if RULES[name].takes == CHAINS:
        return "verifies chains"
    if name == "tree_exact":
        return "carries the distribution"
    return "deterministic" if "chosen" in kind else "distinct" if "without replacement" in kind else "independent"


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_takes_the_drafts_that_fit_and_refuses_all_others(name, kind):
    draft, scores, noise, _ = problem(kind, 6)
    if kind in RULES[name].takes:
        assert RULES[name].rule(draft, scores, noise).next_tokens.shape == (6,)
    else:
        with pytest.raises(ValueError, match=what_does_not_fit(name, kind)):
            RULES[name].rule(draft, scores, noise)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_verdict_on_a_row_depends_on_no_other_row(name, kind):
    rows, some = 30, [17, 3, 22]
    draft, scores, _, _ = problem(kind, rows)
    together = RULES[name].rule(draft, scores, round_noise(5, range(rows), range(rows), CPU))
    verdict = RULES[name].rule(alone(draft, some), scores[some], round_noise(5, some, some, CPU))
    assert same(
        verdict, replace(together, **{x: getattr(together, x)[some] for x in ("counts", "path", "next_tokens")})
    )


def emitted_twice(rule, kind):
    """The first two tokens of each row and the number of accepted ones; where a rule emits one, the second is drawn
    from the target. Also the target's scores."""
    draft, scores, noise, p = problem(kind, rows := 12_000)
    verdict = rule(draft, scores, noise)
    first, second = torch.nn.functional.pad(verdict.emitted(draft), (0, 1))[:, :2].unbind(1)
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    following = draw(p[1 + first].softmax(-1), uniform)
    return first, torch.where(verdict.counts > 0, second, following), verdict.counts, p


def p_value(rule, kind):
    """Chi-square of the first two tokens against the target's distribution."""
    first, second, counts, p = emitted_twice(rule, kind)
    seen = torch.bincount(first * VOCAB + second, minlength=VOCAB**2).double()
    expected = p[0].double().softmax(-1)[:, None] * p[1 : 1 + VOCAB].double().softmax(-1)
    return chisquare(seen, expected.flatten() * len(counts)).pvalue


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if RULES[pair[0]].samples is not False])
def test_a_lossless_rule_keeps_the_targets_distribution_and_another_does_not(name, kind):
    value = p_value(RULES[name].rule, kind)
    assert value > 1e-3 if RULES[name].lossless else value < 1e-6


@pytest.mark.parametrize("kind", sorted(RULES["greedy"].takes))
def test_greedy_emits_the_targets_most_likely_tokens(kind):
    first, second, counts, p = emitted_twice(RULES["greedy"].rule, kind)
    assert (first == p[0].argmax()).all()
    assert (second == p[1 + first].argmax(-1))[counts > 0].all()


def keeps_everything(draft, scores, noise):
    """Wrong: accepts the first token whatever it is."""
    node = torch.ones(len(scores), dtype=torch.int64)
    return specdec.Acceptance.at(draft, node, draw(scores[:, 1].softmax(-1), noise.uniform(Stream.NEXT, 1)[:, 0]))


def cooler(draft):
    """The draft with another distribution than its tokens were drawn from."""
    return replace(draft, probs=draft.probs**2 / (draft.probs**2).sum(-1, keepdim=True))


WRONG = {
    "keeps everything": (keeps_everything, "drawn chain"),
    "q at another temperature": (lambda draft, *rest: rejection(cooler(draft), *rest), "drawn chain"),
    "children called independent": (
        lambda draft, *rest: tree_iid(replace(draft, distinct=False), *rest), "tree drawn without replacement"),
    "children called distinct": (
        lambda draft, *rest: tree_distinct(replace(draft, distinct=True), *rest), "tree drawn independently"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_chi_square_sees_a_wrong_rule(name):
    assert p_value(*WRONG[name]) < 1e-6


FITTING = {
    **dict.fromkeys(("drawn chain", "drawn chain that may end early", "chosen chain"), rejection),
    "tree drawn independently": tree_iid,
    "tree drawn without replacement": tree_distinct,
    "trees of each row drawn without replacement": tree_distinct,
    "chosen tree": tree_exact,
    "chosen trees of each row": tree_exact,
}


def test_lossless_is_the_rule_that_fits_the_draft():
    assert FITTING.keys() == DRAFTS.keys() - {"nothing"}
    for kind, rule in FITTING.items():
        draft, scores, noise, _ = problem(kind, 200)
        assert same(lossless(draft, scores, noise), rule(draft, scores, noise)), kind


@pytest.mark.parametrize("name", RULES)
def test_after_a_draft_of_the_root_alone_comes_a_token_of_the_target(name):
    """A draw with the number of the row, or the most likely token."""
    p, numbers = torch.tensor([[0.5, 0.25, 0.25]] * 4), torch.tensor([[0.1], [0.6], [0.8], [0.3]]).double()
    verdict = RULES[name].rule(
        Draft(TokenTree.chain(0), torch.zeros(4, 1, dtype=torch.int64)),
        p.log()[:, None],
        Chosen(None, numbers, numbers),
    )
    assert verdict.counts.tolist() == [0] * 4 and verdict.path.shape == (4, 0)
    assert verdict.next_tokens.tolist() == ([0, 1, 2, 0] if RULES[name].samples else [0] * 4)


class Picked:
    """The noise of some rows."""

    def __init__(self, noise, rows):
        self._noise, self._rows = noise, rows

    def uniform(self, stream, count):
        return self._noise.uniform(stream, count)[self._rows]


@pytest.mark.parametrize("name", [name for name, case in RULES.items() if case.takes >= DRAWN_CHAINS])
def test_a_row_whose_chain_ends_early_gives_what_the_shorter_chain_gives(name):
    generator, rule = torch.Generator().manual_seed(0), RULES[name].rule
    rows, length, vocabulary = 400, 3, 5
    q = torch.rand(rows, length, vocabulary, generator=generator).softmax(-1)
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    scores = torch.randn(rows, length + 1, vocabulary, generator=generator)
    ends = torch.randint(0, length + 1, (rows,), generator=generator)
    valid = torch.arange(length + 1) <= ends[:, None]
    noise = round_noise(1, range(rows), [0] * rows, CPU)
    verdict = rule(Draft(TokenTree.chain(length), tokens, q, valid=valid), scores, noise)
    assert bool((verdict.counts <= ends).all()) and len(set(verdict.counts.tolist())) > 2
    for end in range(1, length + 1):
        of = ends == end
        short = rule(
            Draft(TokenTree.chain(end), tokens[of, : end + 1], q[of, :end]), scores[of, : end + 1], Picked(noise, of)
        )
        assert torch.equal(verdict.counts[of], short.counts) and torch.equal(verdict.next_tokens[of], short.next_tokens)


@pytest.mark.parametrize("name", [name for name in SAMPLING if RULES[name].takes >= DRAWN_CHAINS])
@pytest.mark.parametrize("length", [1, 2])
def test_a_token_that_the_target_never_says_is_refused_with_the_random_number_zero_too(name, length):
    p, q = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    zeros = torch.zeros(1, length, dtype=torch.float64)
    draft = Draft(TokenTree.chain(length), torch.zeros(1, length + 1, dtype=torch.int64), q.expand(1, length, -1))
    verdict = RULES[name].rule(draft, p.log().expand(1, length + 1, -1), Chosen(None, zeros, zeros))
    assert verdict.counts.tolist() == [0] and verdict.next_tokens.tolist() == [1]


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name, case in RULES.items() if "chosen trees of each row" in case.takes])
def test_rows_with_trees_of_their_own_are_judged_as_each_alone(name, rows):
    generator, rule = torch.Generator().manual_seed(3), RULES[name].rule
    trees = [TokenTree((None, 0, 0, 1, 3)), TokenTree.chain(4), TokenTree((None, 0, 1, 1, 0)), TokenTree((None, 0, 0))]
    parents = torch.full((rows, 5), -1)
    for row, tree in enumerate(trees[:rows]):
        parents[row, 1 : tree.size] = torch.tensor(tree.parents[1:])
    together = TreeBatch(parents, 4, 3)
    together.check()
    tokens = torch.stack([torch.randperm(6, generator=generator)[:5] for _ in trees[:rows]])
    scores = torch.randn(rows, 5, 6, generator=generator)
    verdict = rule(Draft(together, tokens), scores, round_noise(5, range(rows), [0] * rows, CPU))
    of_one = tree_exact if rule is lossless else rule  # it would verify a chain in another way
    for row, tree in enumerate(trees[:rows]):
        one = of_one(
            Draft(tree, tokens[row : row + 1, : tree.size]),
            scores[row : row + 1, : tree.size],
            round_noise(5, [row], [0], CPU),
        )
        assert verdict.counts[row] == one.counts[0] and verdict.next_tokens[row] == one.next_tokens[0]
        assert verdict.path[row, : tree.max_depth].tolist() == one.path[0].tolist()


class Foreign:
    """A rule from elsewhere, of a module without a name."""

    __module__ = None

    def __call__(self, draft, scores, noise):
        return lossless(draft, scores, noise)


def test_only_the_librarys_rules_for_samples_get_scores_that_are_not_written():
    mine = lambda draft, scores, noise: lossless(draft, scores, noise)
    nameless = lambda draft, scores, noise: lossless(draft, scores, noise)
    nameless.__module__ = None
    for rule in (lossless, rejection, block, tree_iid, tree_distinct, tree_exact):
        assert is_built_in(rule) and reads_unwritten(rule)
    for rule in (greedy, Typical()):
        assert is_built_in(rule) and not reads_unwritten(rule)
    for rule in (mine, nameless, Foreign()):
        assert not is_built_in(rule) and not reads_unwritten(rule)


PROMPTS = ragged_prompts(2)


@pytest.mark.covering
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_rule_verifies_the_drafters_whose_drafts_it_takes(drafter, do_sample):
    """All others are refused, and so is a rule for samples in greedy decoding; no page stays taken.

    In eager rounds: captured ones meet every rule with every kind of draft in `test_captured`."""
    kinds, plain = set(), speculative(drafter, mode="eager")

    def watching(draft, scores, noise):
        kinds.add(kind_of(draft))
        return RULES["lossless" if do_sample else "greedy"].rule(draft, scores, noise)

    def generate(rule):
        generator = specdec.SpeculativeGenerator(plain.target, plain.drafter, rule=rule)
        return generator.generate(*PROMPTS, max_new_tokens=4, do_sample=do_sample, seed=0)

    generate(watching)
    assert kinds > {"nothing"} or kinds and "nothing" not in kinds
    for name, case in RULES.items():
        if case.samples not in (None, do_sample):
            with pytest.raises(ValueError, match=f"{name} does not go with do_sample={do_sample}"):
                generate(case.rule)
        elif case.takes >= kinds:
            assert generate(case.rule).stats.lossless is case.lossless, name
        else:
            with pytest.raises(ValueError, match="got|carries the distribution"):
                generate(case.rule)
        require_free(plain)
