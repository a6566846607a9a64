"""Acceptance on trees and blocks: integrated exactly over all random numbers, the output must be the target's own, to
rounding.
"""

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from scipy.stats import chisquare

from specdec.acceptance import (
    Acceptance,
    Typical,
    block,
    lossless,
    rejection,
    tree_distinct,
    tree_exact,
    tree_iid,
)
from specdec.acceptance.base import deepest, descend
from specdec.drafters.model import choose_children, level_plan
from specdec.sampling.draws import draw, residual
from specdec.sampling.noise import Stream, round_noise
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree
from tests.specdec.acceptance.test_acceptance import (
    CPU,
    LAST,
    SURE,
    Chosen,
    Shared,
    after,
    bisect,
    dirichlet,
    float32_tolerance,
    outputs,
    sequences,
    sure_tables,
    tables,
    unsure_tables,
)  # fmt: skip

TREES = [
    TokenTree.from_widths((2,)),
    TokenTree.from_widths((3,)),
    TokenTree.from_widths((2, 1)),
    TokenTree((None, 0, 0, 1, 1)),
    TokenTree((None, 0, 0, 2, 3)),
    TokenTree.chain(3),
]


def real_tables(depths, vocabulary, concentration, seed):
    generator = torch.Generator().manual_seed(seed)
    return [dirichlet(vocabulary**d, vocabulary, concentration, generator) for d in range(depths)]


def with_gaps(made):
    """The same distributions without the least likely token."""
    cut = [table.scatter(1, table.argmin(1, keepdim=True), 0.0) for table in made]
    return [table / table.sum(1, keepdim=True) for table in cut]


def node_tables(tree, p, tokens):
    """`[B, N, V]`: the distribution after every node."""
    return torch.stack([after(p, tokens[:, list(tree.path(node))]) for node in range(tree.size)], 1)


def every_draft(tree, q, distinct, dtype=torch.float64):
    """All drafts of a tree whose children are drawn from q, rounded to `dtype`, and the probability of each.

    Where nothing is left to draw from, the child and all below it are absent.
    """
    vocabulary = q[0].shape[1]
    below = torch.tensor(list(product(range(vocabulary), repeat=tree.size - 1)))
    tokens = torch.nn.functional.pad(below, (1, 0))
    probs = torch.stack([after(q, tokens[:, list(tree.path(node))]) for node in tree.internal], 1).to(dtype)
    weight, valid = torch.ones(len(tokens), dtype=torch.float64), torch.ones_like(tokens, dtype=torch.bool)
    for place, node in enumerate(tree.internal):
        rest = probs[:, place].double()
        for child in tree.children[node]:
            total = rest.sum(1)
            valid[:, child] = valid[:, node] & (total > 0)
            drawn = rest.gather(1, tokens[:, child, None])[:, 0] / total
            weight = weight * torch.where(
                valid[:, child], drawn, (tokens[:, child] == 0).double()
            )  # one stands for all that an absent token could be
            if distinct:
                rest = rest.scatter(1, tokens[:, child, None], 0.0)
    possible = weight > 0
    return Draft(tree, tokens[possible], probs[possible], distinct=distinct, valid=valid[possible]), weight[possible]


def copies(x, count):
    """Each row of a tensor, or of a draft, `count` times."""
    if isinstance(x, torch.Tensor):
        return x.repeat_interleave(count, 0)
    return replace(x, **{name: copies(getattr(x, name), count) for name in ("tokens", "probs", "valid")})


@torch.inference_mode()
def total_variation(rule, tree, p, q, distinct=False, claim=lambda draft: draft, dtype=torch.float64):
    """Between the target and the output of `rule`, a black box whose decisions are thresholds on its numbers: each is
    found by bisection.

    Number `depth * K + branch` of the accept stream decides about a child, K the most children of a node, and one
    number draws the next token. q and the target's scores are given to the rule in `dtype`."""
    draft, weight = every_draft(tree, q, distinct, dtype)
    rows, vocabulary, deepest = len(weight), p[0].shape[1], tree.max_depth
    branches = max(map(len, tree.children))
    scores = node_tables(tree, p, draft.tokens).log().to(dtype)
    draft = claim(draft)
    lines, lengths, weights = [], [], []

    half = torch.full((rows, 1), 0.5, dtype=torch.float64)
    # one copy for each border between two next tokens
    many, many_scores, border = (
        copies(draft, vocabulary - 1),
        copies(scores, vocabulary - 1),
        torch.arange(vocabulary - 1),
    )

    def explore(node, depth, reached, forced):
        for branch, child in enumerate(tree.children[node]):
            place = depth * branches + branch

            def accepts(u, place=place, child=child, depth=depth, forced=forced):
                numbers = forced.clone()
                numbers[:, place] = u
                verdict = rule(draft, scores, Chosen(None, numbers, half))
                return (verdict.counts > depth) & (verdict.path[:, depth] == child)

            share = bisect(accepts, rows)
            taken = forced.clone()
            taken[:, place] = 0
            explore(child, depth + 1, reached * share, taken)
            reached, forced = reached * (1 - share), forced.clone()
            forced[:, place] = LAST
        chosen = partial(Chosen, None, copies(forced, vocabulary - 1))
        below = lambda u: rule(many, many_scores, chosen(u[:, None])).next_tokens <= border.repeat(rows)
        found = bisect(below, rows * (vocabulary - 1)).view(rows, -1)
        borders = torch.cat([torch.zeros(rows, 1), found, torch.ones(rows, 1)], 1)
        before = draft.tokens[:, list(tree.path(node))]
        for token in range(vocabulary):
            line = torch.cat([before, torch.full((rows, 1), token)], 1)
            lines.append(torch.nn.functional.pad(line, (0, deepest + 1 - line.shape[1])))
            lengths.append(torch.full((rows,), depth + 1))
            weights.append(weight * reached * (borders[:, token + 1] - borders[:, token]))

    # numbers behind a forced rejection must reject as well, or a later child would hide the decision that is looked for
    explore(
        0,
        0,
        torch.ones(rows, dtype=torch.float64),
        torch.full((rows, max(1, deepest * branches)), LAST, dtype=torch.float64),
    )
    out = outputs(p, torch.cat(lines), torch.cat(lengths), torch.cat(weights))
    assert abs(out.sum() - 1) < 1e-11
    return (out - sequences(p)).abs().sum().item() / 2


@pytest.mark.covering
@pytest.mark.parametrize("concentration", [0.4, 3.0])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: str(tree.parents))
@pytest.mark.parametrize(("rule", "distinct"), [(tree_iid, False), (tree_distinct, True)])
def test_output_has_exactly_the_targets_distribution(rule, distinct, tree, gaps, concentration):
    vocabulary = (
        4 if len(tree.children[0]) == 3 else 3
    )  # with a gap it still has three tokens to draw without replacement
    p, q = (real_tables(tree.max_depth + more, vocabulary, concentration, seed=more) for more in (1, 0))
    q = with_gaps(q) if gaps else q
    assert total_variation(rule, tree, p, q, distinct) < 1e-12


def test_it_is_exact_for_five_tokens_too():
    p, q = real_tables(2, 5, 1.0, 3), real_tables(1, 5, 1.0, 4)
    for rule, distinct in ((tree_iid, False), (tree_distinct, True)):
        assert total_variation(rule, TokenTree.from_widths((3,)), p, q, distinct) < 1e-12


def cooler(draft):
    return replace(draft, probs=draft.probs**2 / (draft.probs**2).sum(-1, keepdim=True))


def swapped(draft):
    return replace(draft, distinct=not draft.distinct)


@pytest.mark.parametrize(("name", "rule", "distinct", "claim"), [
    ("q at another temperature", tree_iid, False, cooler),
    ("q at another temperature", tree_distinct, True, cooler),
    ("drawn with replacement, verified without", tree_distinct, False, swapped),
    ("drawn without replacement, verified with", tree_iid, True, swapped),
])  # fmt: skip
def test_enumeration_sees_a_planted_bug(name, rule, distinct, claim):
    tree = TokenTree.from_widths((2, 1))
    p, q = real_tables(3, 3, 1.0, 1), real_tables(2, 3, 1.0, 0)
    assert total_variation(rule, tree, p, q, distinct, claim or (lambda draft: draft)) > 1e-3, name


def plain_rule(draft, scores, noise, *, rest=residual, q_of=lambda weights: weights / weights.sum(-1, keepdim=True)):
    """The loop over children written a second time, one level deep, with a handle on the steps that a bug could be
    in.
    """
    r, weights = scores[:, 0].softmax(-1), draft.probs[:, 0]
    uniform, chosen = noise.uniform(Stream.ACCEPT, draft.tree.size - 1), torch.zeros(len(r), dtype=torch.int64)
    for child in range(1, draft.tree.size):
        token, q = draft.tokens[:, child, None], q_of(weights)
        accepted = (
            uniform[:, child - 1, None] * q.gather(1, token) < r.gather(1, token)
        ) & draft.tables.valid.expand_as(draft.tokens)[:, child, None]
        chosen = torch.where((chosen == 0) & accepted[:, 0], child, chosen)
        r = torch.where(
            (chosen == 0)[:, None] & draft.tables.valid.expand_as(draft.tokens)[:, child, None], rest(r, q), r
        )
        weights = weights.scatter(1, token, 0.0) if draft.distinct else weights
    r = torch.where(chosen[:, None] > 0, scores[torch.arange(len(r)), chosen].softmax(-1), r)
    return Acceptance.at(draft, chosen, draw(r, noise.uniform(Stream.NEXT, 1)[:, 0]))


def divided_by_a_clamped_sum(weights):
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-38)


@pytest.mark.parametrize("distinct", [False, True])
def test_enumeration_sees_a_rejected_child_whose_probability_comes_back(distinct):
    p, q = real_tables(2, 3, 1.0, 1), real_tables(1, 3, 1.0, 0)
    assert total_variation(plain_rule, TokenTree.from_widths((2,)), p, q, distinct) < 1e-12
    assert total_variation(partial(plain_rule, rest=lambda r, q: r), TokenTree.from_widths((2,)), p, q, distinct) > 1e-3


@pytest.mark.parametrize(
    ("tree", "gaps"),
    [
        *product([TokenTree.from_widths((2,))], SURE),
        *product([TokenTree.from_widths((3,))], (SURE[3], SURE[6], SURE[8])),
        *product([TokenTree((None, 0, 0, 1, 1)), TokenTree((None, 0, 0, 2, 3))], (SURE[3], SURE[6])),
    ],
    ids=lambda value: str(getattr(value, "parents", value)),
)
def test_output_is_exact_in_float32_for_a_draft_or_a_target_that_is_very_sure(tree, gaps):
    depth, tolerance = tree.max_depth, float32_tolerance(tree)
    unsure, sure = unsure_tables(depth + 1, len(gaps), tree.size), sure_tables(depth + 1, gaps, tree.size)
    for rule, distinct in ((tree_iid, False), (tree_distinct, True)):
        assert total_variation(rule, tree, unsure, sure[:depth], distinct, dtype=torch.float32) < tolerance
        if depth == 1:
            assert total_variation(rule, tree, sure, unsure[:depth], distinct, dtype=torch.float32) < tolerance


@pytest.mark.parametrize(("gap", "seen"), [(85.0, False), (90.0, True), (95.0, True), (100.0, True)])
def test_integration_in_float32_sees_a_clamped_sum(gap, seen):
    tree, gaps = TokenTree.from_widths((2,)), (0.0, gap, gap + 0.5, 300.0)
    p, q = unsure_tables(2, 4, 0), sure_tables(1, gaps, 0)
    assert total_variation(plain_rule, tree, p, q, True, dtype=torch.float32) < float32_tolerance(tree)
    assert (
        total_variation(partial(plain_rule, q_of=divided_by_a_clamped_sum), tree, p, q, True, dtype=torch.float32)
        > 1e-2
    ) == seen


@pytest.mark.parametrize("gaps", SURE, ids=str)
def test_the_second_child_of_a_sure_draft_is_drawn_from_the_float32_weights_that_are_left(gaps):
    """The rule takes those weights for what the child was drawn from: their shares are found as thresholds on the
    second child's number.
    """
    (level,) = level_plan(TokenTree.from_widths((2,)), CPU)
    scores = -torch.tensor(gaps)
    weights = scores.softmax(-1).double().scatter(0, scores.argmax(), 0.0)  # the first child takes the likeliest token
    rows = len(gaps) - 1

    def children(second):
        return choose_children(
            scores.expand(rows, 1, -1), level, torch.stack([torch.full((rows,), 1e-9, dtype=torch.float64), second], 1)
        )

    exists = children(torch.zeros(rows, dtype=torch.float64))[1]
    assert exists[:, 1].tolist() == [bool(weights.sum() > 0)] * rows
    if weights.sum() > 0:
        borders = bisect(lambda u: children(u)[0][:, 1] <= torch.arange(rows), rows)
        torch.testing.assert_close(borders, (weights.cumsum(0) / weights.sum())[:-1], atol=1e-12, rtol=0)


def drawn_tokens(p, q, cells, tree, rule, share=False):
    """Output of one drafted level integrated over a grid of all numbers, drafted by the library itself."""
    children = tree.size - 1
    sizes = [cells] * (2 * children + 1)
    grid = torch.cartesian_prod(*((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in sizes))
    noise = Chosen(grid[:, :children], grid[:, children : 2 * children], grid[:, 2 * children :])
    (level,) = level_plan(tree, CPU)
    scores = q[0].log().expand(len(grid), 1, -1)
    probs = torch.empty_like(scores)
    tokens, exists = choose_children(scores, level, noise.draft, probs)
    draft = Draft(
        tree,
        torch.nn.functional.pad(tokens, (1, 0)),
        probs,
        distinct=True,
        valid=torch.nn.functional.pad(exists, (1, 0), value=True),
    )
    verdict = rule(
        draft, node_tables(tree, p, draft.tokens).log(), Shared(noise, Stream.ACCEPT, Stream.DRAFT) if share else noise
    )
    out = outputs(
        p, verdict.emitted(draft), verdict.counts + 1, torch.full((len(grid),), 1 / len(grid), dtype=torch.float64)
    )
    return (out - sequences(p)).abs().sum().item() / 2


def test_shared_noise_is_seen_and_separate_streams_pass():
    """p = (3, 1) / 4 and q = (1, 1) / 2: all steps lie at multiples of 1 / 12."""
    p = [torch.tensor([[3, 1]]).double() / 4, torch.tensor([[1, 1], [1, 3]]).double() / torch.tensor([[2], [4]])]
    q = [torch.tensor([[1, 1]]).double() / 2]
    tree = TokenTree.from_widths((2,))
    assert drawn_tokens(p, q, 12, tree, tree_distinct) < 1e-12
    assert drawn_tokens(p, q, 12, tree, tree_distinct, share=True) > 1e-2


@pytest.mark.parametrize("weights", [(3, 2, 1, 0), (1, 1, 1, 1), (1, 0, 0, 0), (2, 1, 0, 0)])
def test_children_without_replacement_are_drawn_one_after_the_other_from_what_is_left(weights):
    q = torch.tensor(weights).double() / sum(weights)
    (level,) = level_plan(TokenTree.from_widths((3,)), CPU)
    cells = 60
    grid = torch.cartesian_prod(*[(torch.arange(cells, dtype=torch.float64) + 0.5) / cells] * 3)
    probs = q.new_empty(len(grid), 1, q.shape[-1])
    tokens, exists = choose_children(q.log().expand(len(grid), 1, -1), level, grid, probs)
    assert torch.allclose(probs, q.expand(len(grid), 1, -1), atol=1e-15)
    seen: dict = {}
    for chosen, there in zip(tokens.tolist(), exists.tolist(), strict=True):
        key = tuple(t for t, e in zip(chosen, there, strict=True) if e)
        seen[key] = seen.get(key, 0) + 1 / len(grid)
    support = sum(w > 0 for w in weights)
    for key, share in seen.items():
        assert len(key) == min(3, support) == len(set(key))
        expected, left = 1.0, 1.0
        for token in key:
            expected, left = expected * float(q[token]) / left, left - float(q[token])
        assert share == pytest.approx(expected, abs=1e-9)


# deterministic trees


def deterministic(tree, vocabulary, rows):
    """The most likely children in the order of their ranks, the same whatever came before."""
    return Draft(
        tree, torch.tensor([(0, *(tree.ranks[node] for node in range(1, tree.size)))]).expand(rows, -1).contiguous()
    )


def total_variation_deterministic(rule, tree, p, cells, dtype=torch.float64):
    """p in multiples of 1 / cells, one number a depth: all of them."""
    depth = tree.max_depth + 1
    grid = torch.cartesian_prod(*[(torch.arange(cells, dtype=torch.float64) + 0.5) / cells] * depth).view(-1, depth)
    draft = deterministic(tree, p[0].shape[1], len(grid))
    verdict = rule(draft, node_tables(tree, p, draft.tokens).log().to(dtype), Chosen(None, grid, grid[:, :1]))
    out = outputs(
        p, verdict.emitted(draft), verdict.counts + 1, torch.full((len(grid),), 1 / len(grid), dtype=torch.float64)
    )
    return (out - sequences(p)).abs().sum().item() / 2


def one_draw_a_path(draft, scores, noise):
    """Wrong: every path to a leaf draws for itself, and the longest that holds wins."""
    tree, p = draft.tree, scores.softmax(-1)
    leaves = [node for node in range(tree.size) if not tree.children[node]]
    uniform = noise.uniform(Stream.ACCEPT, 99)
    best = torch.zeros(len(p), dtype=torch.int64)
    following = draw(p[:, 0], uniform[:, 0])
    for number, leaf in enumerate(leaves):
        going = torch.ones(len(p), dtype=torch.bool)
        for depth, node in enumerate(tree.path(leaf)):
            parent = tree.parents[node]
            going = going & (
                uniform[:, (depth + number) % uniform.shape[1]]
                < p[:, parent].gather(1, draft.tokens[:, node, None])[:, 0]
            )
            better = going & (torch.tensor(tree.depths)[best] < depth + 1)
            best = torch.where(better, node, best)
            following = torch.where(better, draw(p[:, node], uniform[:, -1]), following)
    return Acceptance.at(draft, best, following)


@pytest.mark.parametrize(
    "tree", [*TREES, TokenTree.from_widths((2, 2)), TokenTree.chain(0)], ids=lambda tree: str(tree.parents)
)
def test_one_draw_a_node_is_exact_for_deterministic_trees(tree):
    generator = torch.Generator().manual_seed(tree.size)
    for support in ("full", "any"):
        p = tables(tree.max_depth + 1, 4, 6, support, generator)
        assert total_variation_deterministic(tree_exact, tree, p, 6) < 1e-12
        assert (
            total_variation_deterministic(tree_exact, tree, p, 6, torch.float32) < 1e-12
        )  # its steps lie far from the numbers tried


@pytest.mark.parametrize("tree", [*TREES, TokenTree.from_widths((2, 2))], ids=lambda tree: str(tree.parents))
def test_one_draw_a_node_goes_to_the_child_that_holds_it_as_long_as_one_does(tree):
    """Stopping early would be exact as well: against a walk in plain Python, a row after the other."""
    generator, rows, vocabulary = torch.Generator().manual_seed(tree.size), 300, 4
    draft = deterministic(tree, vocabulary, rows)
    scores, uniform = (
        torch.randn(rows, tree.size, vocabulary, generator=generator),
        torch.rand(rows, tree.max_depth + 1, generator=generator),
    )
    verdict, met = tree_exact(draft, scores, Chosen(None, uniform.double(), uniform[:, :1].double())), set()
    for row in range(rows):
        node, path = 0, []
        while True:
            token = draw(scores[row, node].softmax(-1), uniform[row, len(path)].double()).item()
            child = next((child for child in tree.children[node] if draft.tokens[row, child] == token), None)
            if child is None:
                break
            path.append(child)
            node = child
        met |= set(path)
        assert verdict.counts[row] == len(path) and verdict.path[row].tolist() == path + [0] * (
            tree.max_depth - len(path)
        )
        assert verdict.next_tokens[row] == token
    assert met == set(range(1, tree.size)), "every node was accepted somewhere"


def test_one_draw_a_path_is_seen():
    p = tables(3, 4, 6, "full", torch.Generator().manual_seed(0))
    assert total_variation_deterministic(one_draw_a_path, TokenTree.from_widths((2, 2)), p, 6) > 1e-2


# rows with trees of their own


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_verdict_takes_each_rows_path_from_its_own_tree(rows):
    parents = torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, 1, 2, 3], [-1, 0, 0, 0, 2]])[:rows]
    draft = Draft(TreeBatch(parents, 4, 3), torch.zeros(rows, 5, dtype=torch.int64))
    verdict = Acceptance.at(draft, torch.full((rows,), 4), torch.arange(rows))
    assert (
        verdict.counts.tolist() == [3, 4, 2][:rows]
        and verdict.path.tolist() == [[1, 3, 4, 0], [1, 2, 3, 4], [2, 4, 0, 0]][:rows]
    )
    assert verdict.next_tokens.tolist() == list(range(rows))


def test_dropping_an_unsure_token_is_seen_and_keeping_it_is_exact():
    """q = p = (0.7, 0.2, 0.1), threshold 0.5: without its unsure tokens the draft proposes what it is sure of too
    often.
    """
    p, q = real_tables(2, 3, 1.0, 8), [torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)]
    chain, (draft, _) = TokenTree.chain(1), every_draft(TokenTree.chain(1), q, False)
    unsure = draft.probs[:, 0].gather(1, draft.tokens[:, 1:]) < 0.5
    dropped = partial(replace, valid=torch.nn.functional.pad(~unsure, (1, 0), value=True))
    assert total_variation(rejection, chain, p, q) < 1e-12
    assert total_variation(rejection, chain, p, q, claim=dropped) > 1e-2


# blocks


def total_variation_of_blocks(rule, p, q, dtype=torch.float64):
    """Blocks decide about each prefix with a number of its own: thresholds found with all longer prefixes rejected."""
    length, tree = len(q), TokenTree.chain(len(q))
    draft, weight = every_draft(tree, q, False, dtype)
    rows, vocabulary = len(weight), p[0].shape[1]
    scores = node_tables(tree, p, draft.tokens).log().to(dtype)

    def verify(numbers, following=0.5):
        return rule(
            draft, scores, Chosen(None, numbers, torch.as_tensor(following, dtype=torch.float64).expand(rows)[:, None])
        )

    lines, lengths, weights = [], [], []
    reached = torch.ones(rows, dtype=torch.float64)
    for count in range(length, -1, -1):  # the longest prefix first
        numbers = torch.full((rows, length), LAST, dtype=torch.float64)
        share = torch.ones(rows, dtype=torch.float64)
        if count:

            def accepts(u, count=count, numbers=numbers):
                tried = numbers.clone()
                tried[:, count - 1] = u
                return verify(tried).counts >= count

            share = bisect(accepts, rows)
            numbers[:, count - 1] = 0
        borders = [
            bisect(lambda u, t=token, numbers=numbers: verify(numbers, u).next_tokens <= t, rows)
            for token in range(vocabulary - 1)
        ]
        borders = torch.stack([torch.zeros(rows), *borders, torch.ones(rows)], 1)
        for token in range(vocabulary):
            line = torch.cat([draft.tokens[:, 1 : count + 1], torch.full((rows, 1), token)], 1)
            lines.append(torch.nn.functional.pad(line, (0, length - count)))
            lengths.append(torch.full((rows,), count + 1))
            weights.append(weight * reached * share * (borders[:, token + 1] - borders[:, token]))
        reached = reached * (1 - share)
    mass, kept = torch.cat(weights), torch.cat(lengths) - 1
    out = outputs(p, torch.cat(lines), torch.cat(lengths), mass)
    return (out - sequences(p)).abs().sum().item() / 2, float((mass * kept).sum())


@pytest.mark.covering
@pytest.mark.parametrize("concentration", [0.3, 3.0])
@pytest.mark.parametrize(("vocabulary", "length"), [(3, 1), (5, 1), (3, 2), (4, 2), (3, 3)])
def test_blocks_are_exact_and_accept_no_fewer_tokens_than_one_after_the_other(vocabulary, length, concentration):
    p, q = real_tables(length + 1, vocabulary, concentration, 1), real_tables(length, vocabulary, concentration, 2)
    distance, tokens = total_variation_of_blocks(block, p, q)
    assert distance < 1e-12
    one_by_one = sum(
        float((sequences([torch.minimum(x, y) for x, y in zip(p, q, strict=False)][:n])).sum())
        for n in range(1, length + 1)
    )
    assert tokens >= one_by_one - 1e-12
    if length > 1:
        assert tokens > one_by_one + 1e-4, "a block of two tokens and more gains something"


@pytest.mark.parametrize(("length", "gaps"), [*product((1,), SURE), *product((2,), (SURE[3], SURE[6], SURE[8]))])
def test_blocks_are_exact_in_float32_for_a_draft_or_a_target_that_is_very_sure(length, gaps):
    for p, q in ((unsure_tables(length + 1, len(gaps), length), sure_tables(length, gaps, length)),
                 (sure_tables(length + 1, gaps, length), unsure_tables(length, len(gaps), length)),
                 (sure_tables(length + 1, gaps, length), sure_tables(length, gaps, length + 1))):  # fmt: skip
        assert total_variation_of_blocks(block, p, q, torch.float32)[0] < float32_tolerance(TokenTree.chain(length))


def test_a_block_rule_that_takes_the_residual_of_a_single_token_is_seen():
    def wrong(draft, scores, noise):
        verdict = block(draft, scores, noise)
        p = scores.softmax(-1)
        at = torch.arange(len(p)), verdict.counts.clamp(max=draft.tree.size - 2)
        plain = draw((p[at] - draft.probs[at]).clamp(min=1e-30), noise.uniform(Stream.NEXT, 1)[:, 0])
        return replace(
            verdict, next_tokens=torch.where(verdict.counts < draft.tree.size - 1, plain, verdict.next_tokens)
        )

    p, q = real_tables(3, 5, 3.0, 1), real_tables(2, 5, 3.0, 2)
    assert total_variation_of_blocks(block, p, q)[0] < 1e-12
    assert total_variation_of_blocks(wrong, p, q)[0] > 1e-3


# typical acceptance, and what the rules refuse


def test_typical_keeps_likely_tokens_and_follows_the_likeliest_of_the_longest_paths():
    tree = TokenTree.from_widths((2, 1))
    p = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [0.02, 0.08, 0.9], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]])
    tokens = torch.tensor([[0, 0, 1, 2, 2]])  # children of the root: tokens 0 and 1, both followed by token 2
    verdict = Typical(0.3, 1.0)(Draft(tree, tokens), p.log()[None])
    assert verdict.path.tolist() == [[2, 4]] and verdict.next_tokens.tolist() == [1]  # 0.4 * 0.9 beats 0.5 * 0.6
    strict = Typical(0.3, 1.0)(
        Draft(tree, torch.tensor([[0, 2, 2, 2, 2]])), p.log()[None]
    )  # 0.1 is too unlikely, so what follows is lost
    assert strict.counts.tolist() == [0] and strict.next_tokens.tolist() == [0]
    assert Typical().lossless is False


@pytest.mark.parametrize(
    "tree",
    [*TREES, TokenTree.from_widths((3, 2)), TokenTree.from_widths((2, 2, 1))],
    ids=lambda tree: str(tree.parents),
)
def test_typical_takes_the_path_that_a_search_in_plain_python_takes(tree):
    generator, rows, vocabulary, epsilon, delta = torch.Generator().manual_seed(tree.size), 100, 6, 0.12, 0.5
    tokens = torch.randint(vocabulary, (rows, tree.size), generator=generator)
    scores = torch.randn(rows, tree.size, vocabulary, generator=generator, dtype=torch.float64)
    verdict = Typical(epsilon, delta)(Draft(tree, tokens), scores)
    depths = set()
    for row in range(rows):
        p = scores[row].softmax(-1)
        floor = [min(epsilon, delta * math.exp(sum(x * math.log(x) for x in line))) for line in p.tolist()]
        likely = {node: p[tree.parents[node], tokens[row, node]].item() for node in range(1, tree.size)}
        paths = [
            tree.path(node)
            for node in range(tree.size)
            if all(likely[n] > floor[tree.parents[n]] for n in tree.path(node))
        ]
        best = max(paths, key=lambda path: (len(path), math.prod(likely[n] for n in path)))
        depths.add(len(best))
        assert verdict.path[row, : len(best)].tolist() == list(best) and verdict.counts[row] == len(best)
        assert verdict.next_tokens[row] == p[best[-1] if best else 0].argmax()
    assert depths == set(range(tree.max_depth + 1))


def kept_by_typical(p, token, epsilon, delta):
    draft = Draft(TokenTree.chain(1), torch.tensor([[0, token]]))
    return Typical(epsilon, delta)(draft, torch.tensor([[p, p]]).log()).counts.item() == 1


@pytest.mark.parametrize(("p", "token", "epsilon", "delta", "kept"), [
    ([0.05] * 20, 3, 0.09, 0.3, True),  # H = log 20: p = 0.05 > 0.3 / 20, though below epsilon
    # p = 1 / 20 is not above exp(-H) = 1 / 20: the threshold is the smaller of the two
    ([0.05] * 20, 3, 0.09, 1.0, False),
    ([0.88, 0.12, 0.0], 1, 0.09, 1.0, True),  # exp(-H) = 0.69, but epsilon is enough
    ([0.93, 0.07, 0.0], 1, 0.09, 1.0, False),  # less than both
    ([0.5, 0.25, 0.25], 1, 0.25, 1.0, False),  # as much as epsilon is not more
    ([0.93, 0.07, 0.0], 1, 0.09, 0.05, True),  # 0.05 exp(-H) = 0.04
    ([0.93, 0.07, 0.0], 2, 0.09, 0.05, False),  # impossible tokens do not pass, and their p log p is no NaN
])  # fmt: skip
def test_typical_keeps_what_lies_above_the_smaller_threshold(p, token, epsilon, delta, kept):
    assert kept_by_typical(p, token, epsilon, delta) == kept


def test_typical_is_not_lossless_and_the_enumeration_says_so():
    p, q = real_tables(2, 3, 1.0, 1), real_tables(1, 3, 1.0, 2)
    draft, weight = every_draft(TokenTree.chain(1), q, False)
    verdict = Typical()(draft, node_tables(draft.tree, p, draft.tokens).log())
    out = outputs(p, verdict.emitted(draft), verdict.counts + 1, weight)
    assert (out - sequences(p)).abs().sum() > 1e-2


def test_the_token_before_the_draft_does_not_count_towards_a_paths_likelihood():
    """The target holds the root's own token for impossible; the second child is a little likelier than the first, less
    than a sum near -1e4 can tell.
    """
    p = torch.tensor([[0.0, 0.4, 0.4001, 0.1999], [0.25] * 4, [0.25] * 4])
    verdict = Typical(0.3, 1.0)(Draft(TokenTree.from_widths((2,)), torch.tensor([[0, 1, 2]])), p.log()[None])
    assert verdict.path.tolist() == [[2]]


def test_the_largest_thresholds_keep_only_what_lies_above_one_over_the_spread():
    assert Typical(1, 1).epsilon == Typical(1, 1).delta == 1
    assert kept_by_typical([0.88, 0.12, 0.0], 0, 1.0, 1.0) and not kept_by_typical(
        [0.88, 0.12, 0.0], 1, 1.0, 1.0
    )  # exp(-H) = 0.69


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0, 0.3), (-0.5, 0.3), (1.5, 0.3), (0.1, 0), (0.1, -0.5), (0.1, 1.5), (float("nan"), 0.3), (0.1, float("nan"))],
)
def test_thresholds_outside_their_range_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match="epsilon and delta"):
        Typical(epsilon, delta)


def test_a_chosen_tree_that_claims_distinct_children_has_no_distribution_to_verify_with():
    draft = Draft(TokenTree.from_widths((2,)), torch.zeros(1, 3, dtype=torch.int64), distinct=True)
    with pytest.raises(ValueError, match="deterministic"):
        tree_distinct(draft, torch.zeros(1, 3, 4), None)


@pytest.mark.parametrize("rule", [tree_iid, tree_distinct])
def test_one_token_without_a_distribution_is_no_draw_either(rule):
    with pytest.raises(ValueError, match="deterministic"):
        rule(Draft(TokenTree.chain(1), torch.zeros(1, 2, dtype=torch.int64)), torch.zeros(1, 2, 4), None)


def test_where_no_node_is_right_the_root_is_the_deepest_however_likely_the_others_are():
    draft = Draft(TokenTree.from_widths((2, 1)), torch.zeros(2, 5, dtype=torch.int64))
    right = torch.tensor([[False] * 5, [False, False, False, True, True]])  # in row 1 two that hang below wrong ones
    assert deepest(draft, right).tolist() == [0, 0]
    assert deepest(draft, right, torch.tensor([[0.0, 4.0, 3.0, 2.0, 1.0]] * 2)).tolist() == [0, 0]


def test_descend_asks_every_row_until_the_deepest_ends():
    draft = Draft(TokenTree.from_widths((2, 1)), torch.zeros(3, 5, dtype=torch.int64))
    ways = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 4, 0]])
    end, kept = descend(draft, lambda node, depth: (ways[:, depth], ways[:, depth] + 10 * depth))
    assert end.tolist() == [0, 1, 4] and kept.tolist() == [0, 10, 20]


@pytest.mark.parametrize(("rule", "distinct"), [(tree_iid, False), (tree_distinct, True)])
def test_chi_square_over_a_real_vocabulary(rule, distinct):
    """The first emitted token of 40,000 rows with the library's own noise, in float32."""
    generator, rows, vocabulary = torch.Generator().manual_seed(0), 40_000, 60
    tree = TokenTree.from_widths((3, 1))
    p = torch.randn(vocabulary + 1, vocabulary, generator=generator)
    q = (p[0] + 0.7 * torch.randn(vocabulary, generator=generator)).softmax(-1)
    noise = round_noise(3, range(rows), [1] * rows, CPU)
    probs, tokens, rest = q.expand(rows, 1, -1), [], q.expand(rows, -1)
    for number in range(3):
        tokens.append(draw(rest, noise.uniform(Stream.DRAFT, 6)[:, number]))
        rest = rest.scatter(1, tokens[-1][:, None], 0.0) if distinct else rest
    below = [draw(q.expand(rows, -1), noise.uniform(Stream.DRAFT, 6)[:, 3 + number]) for number in range(3)]
    draft = Draft(
        tree, torch.stack([torch.zeros_like(tokens[0]), *tokens, *below], 1), probs.expand(-1, 4, -1), distinct=distinct
    )
    scores = torch.stack([p[0].expand(rows, -1), *(p[1 + draft.tokens[:, node]] for node in range(1, 7))], 1)
    verdict = rule(draft, scores, noise)
    first = verdict.emitted(draft)[:, 0]
    assert (
        chisquare(
            torch.bincount(first, minlength=vocabulary).numpy(), (rows * p[0].double().softmax(-1)).numpy()
        ).pvalue
        > 1e-3
    )
    assert float((verdict.counts > 0).float().mean()) > 0.6


@pytest.mark.parametrize("rule", [tree_exact, tree_distinct, tree_iid, rejection, block])
def test_a_row_without_a_node_gets_the_token_of_a_plain_step(rule):
    """Whether a plain step follows can depend on other rows of the batch; the row's token must not."""
    tree = TokenTree.chain(2) if rule in (rejection, block) else TokenTree.from_widths((2, 1))
    rows, vocabulary = 200, 5
    scores = torch.randn(rows, tree.size, vocabulary, generator=torch.Generator().manual_seed(1))
    noise = round_noise(3, range(rows), [4] * rows, CPU)
    draft = deterministic(tree, vocabulary, rows)
    probs = None if rule is tree_exact else torch.full((rows, len(tree.internal), vocabulary), 1 / vocabulary)
    absent = torch.arange(tree.size).expand(rows, -1) == 0
    without = rule(Draft(tree, draft.tokens, probs, rule is tree_distinct, absent), scores, noise)
    plain = lossless(Draft(TokenTree.chain(0), draft.tokens[:, :1]), scores[:, :1], noise)
    assert without.counts.eq(0).all() and without.next_tokens.equal(plain.next_tokens)
    assert len(set(plain.next_tokens.tolist())) == vocabulary
