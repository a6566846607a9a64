"""The rules for drawn children as kernels, against PyTorch: on a GPU or in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from attention.dispatch import triton_available
from specdec.acceptance.block import block
from specdec.acceptance.rejection import rejection
from specdec.acceptance.tree_exact import tree_exact
from specdec.acceptance.tree_iid import child_by_child
from specdec.sampling.draws import draw
from specdec.sampling.noise import round_noise
from specdec.sampling.warped import warp_lazily
from specdec.sampling.warpers import Warper, hf, warp
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree
from tests.attention.devices import DEVICE

pytestmark = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
TREE, CHAIN = TokenTree.from_widths((3, 2)), TokenTree.chain(4)
ROWS, SIZE = 12, 40


def drafted(tree, distinct, seed, gap=1.5):
    """Scores `[ROWS, N, SIZE]`, some at -inf, and a draft from other ones, of which rows lack nodes."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(ROWS, tree.size, SIZE, generator=generator)
    scores[:3, :, ::3] = float("-inf")
    inner = torch.tensor(tree.internal)
    q = (scores[:, inner] + gap * torch.randn(ROWS, len(inner), SIZE, generator=generator)).softmax(-1)
    tokens, valid = torch.zeros(ROWS, tree.size, dtype=torch.int64), torch.ones(ROWS, tree.size, dtype=torch.bool)
    for place, node in enumerate(tree.internal):
        rest = q[:, place]
        for child in tree.children[node]:
            tokens[:, child] = draw(rest, torch.rand(ROWS, generator=generator, dtype=torch.float64))
            rest = rest.scatter(1, tokens[:, child, None], 0.0) if distinct else rest
    lacking = tree.size - 1
    valid[5:7, lacking] = False
    return Draft(tree, tokens.to(DEVICE), q.to(DEVICE), distinct, valid.to(DEVICE)), scores.to(DEVICE)


def same(ours, theirs, draft):
    """Whether two verdicts are equal, in what has a meaning."""
    assert ours.counts.equal(theirs.counts) and ours.next_tokens.equal(theirs.next_tokens)
    mine, other = ours.emitted(draft), theirs.emitted(draft)
    for row, count in enumerate(ours.counts.tolist()):
        assert mine[row, : count + 1].equal(other[row, : count + 1])
        assert ours.path[row, :count].equal(theirs.path[row, :count])


@pytest.mark.covering
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("distinct", [False, True])
def test_child_by_child(distinct, seed):
    draft, scores = drafted(TREE, distinct, seed)
    noise = round_noise(seed, range(ROWS), [3] * ROWS, torch.device(DEVICE))
    ours, theirs = (child_by_child(draft, scores, noise, impl) for impl in ("triton", "reference"))
    same(ours, theirs, draft)
    assert len(set(theirs.counts.tolist())) == 3  # rows stop at every depth


@pytest.mark.covering
@pytest.mark.parametrize("rule", [rejection, block])
@pytest.mark.parametrize("drawn", [False, True])
def test_chains(rule, drawn):
    for seed in range(2):
        draft, scores = drafted(CHAIN, False, seed)
        draft = draft if drawn else replace(draft, probs=None)
        noise = round_noise(seed, range(ROWS), [5] * ROWS, torch.device(DEVICE))
        ours, theirs = (rule(draft, scores, noise, impl) for impl in ("triton", "reference"))
        same(ours, theirs, draft)
        assert len(set(theirs.counts.tolist())) >= (3 if drawn else 2)


@pytest.mark.parametrize("rule", [rejection, block, child_by_child])
def test_rows_may_lie_in_columns(rule):
    """Nodes that exist, as a drafter makes them level by level, and distributions in float64."""
    draft, scores = drafted(CHAIN, False, 0)
    draft = replace(draft, valid=draft.valid.t().contiguous().t(), probs=draft.probs.double())
    noise = round_noise(0, range(ROWS), [5] * ROWS, torch.device(DEVICE))
    same(*(rule(draft, scores, noise, impl) for impl in ("triton", "reference")), draft)


def test_a_draft_from_the_target_itself_is_accepted_whole():
    """Nothing is left of p - q then, which must not break a rule."""
    draft, scores = drafted(CHAIN, False, 0, gap=0.0)
    draft = replace(draft, valid=None)
    noise = round_noise(0, range(ROWS), [0] * ROWS, torch.device(DEVICE))
    for rule in (rejection, block, child_by_child):
        assert rule(draft, scores, noise, "triton").counts.tolist() == [4] * ROWS


def test_rules_read_scores_that_are_not_written():
    """Sixteen-bit logits, a temperature and min-p, over more than one block."""
    size, warpers = 5000, [Warper(hf.TemperatureLogitsWarper), Warper(hf.MinPLogitsWarper)]
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, TREE.size, size, generator=generator)).to(DEVICE, torch.bfloat16)
    numbers = torch.tensor([[0.7], [0.02]], dtype=torch.float64, device=DEVICE).expand(-1, 3 * TREE.size)
    scores = warp(warpers, numbers, logits.flatten(0, 1).float()).view(logits.shape)
    q = (scores[:, list(TREE.internal)] * 0.8).softmax(-1)
    tokens = torch.zeros(3, TREE.size, dtype=torch.int64, device=DEVICE)
    for place, node in enumerate(TREE.internal):
        tokens[:, list(TREE.children[node])] = q[:, place].topk(len(TREE.children[node])).indices
    draft = Draft(TREE, tokens, q, True)
    noise = round_noise(1, range(3), [0] * 3, torch.device(DEVICE))
    lazy = warp_lazily(warpers, numbers, logits, "triton")
    assert lazy is not None
    same(child_by_child(draft, lazy, noise), child_by_child(draft, scores, noise, "reference"), draft)


@pytest.mark.parametrize("tree", [TREE, CHAIN, TokenTree.chain(0)])
def test_a_deterministic_tree_is_verified_by_the_same_draws_where_scores_are_not_written(tree):
    draft, scores = drafted(tree, True, 0) if tree.size > 1 else (None, torch.randn(ROWS, 1, SIZE, device=DEVICE))
    draft = replace(draft, probs=None) if draft else Draft(tree, torch.zeros(ROWS, 1, dtype=torch.int64, device=DEVICE))
    noise = round_noise(0, range(ROWS), [9] * ROWS, torch.device(DEVICE))
    lazy = warp_lazily([], torch.zeros(0, ROWS * tree.size, dtype=torch.float64, device=DEVICE), scores, "triton")
    assert lazy is not None
    ours, theirs = (tree_exact(draft, given, noise) for given in (lazy, scores))
    same(ours, theirs, draft)
    assert len(set(theirs.counts.tolist())) == (1 if tree.size == 1 else 3 if tree is TREE else 2)


def test_every_row_has_its_own_tree():
    """Two shapes, of the same nodes as far as the rule can tell: as many children, drawn from as many distributions."""
    shapes = [TokenTree((None, 0, 0, 1, 1, 2)), TokenTree((None, 0, 1, 1, 0, 4))]
    parents = torch.tensor([[-1, *shapes[row % 2].above[1:]] for row in range(ROWS)])
    halves = [drafted(shape, True, 3) for shape in shapes]
    even = torch.arange(ROWS, device=DEVICE) % 2 == 0
    mixed = lambda first, second: torch.where(even.view(-1, *[1] * (first.ndim - 1)), first, second)
    one, other = (draft for draft, _ in halves)
    parents = torch.where(mixed(one.valid, other.valid).cpu(), parents, -1)
    tree = TreeBatch(parents.to(DEVICE), 2, 2)
    tree.check()
    draft = Draft(tree, mixed(one.tokens, other.tokens), mixed(one.probs, other.probs), True)
    scores, lengths = mixed(*(scores for _, scores in halves)), set()
    for seed in range(3):
        noise = round_noise(seed, range(ROWS), [3] * ROWS, torch.device(DEVICE))
        ours, theirs = (child_by_child(draft, scores, noise, impl) for impl in ("triton", "reference"))
        same(ours, theirs, draft)
        for row in range(ROWS):  # the same as of one tree for all rows
            alone = child_by_child(halves[row % 2][0], halves[row % 2][1], noise, "reference")
            assert int(alone.counts[row]) == int(theirs.counts[row])
            assert int(alone.next_tokens[row]) == int(theirs.next_tokens[row])
        lengths |= {*theirs.counts.tolist()}
    assert lengths == {0, 1, 2}
