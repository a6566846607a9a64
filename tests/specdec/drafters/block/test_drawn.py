"""Trees of drawn tokens: over all that may be drawn, the output has exactly the target's distribution."""

from dataclasses import replace
from itertools import permutations, product

import pytest
import torch

from specdec.acceptance.tree_distinct import tree_distinct
from specdec.acceptance.tree_iid import child_by_child
from specdec.drafters.block import drawn as module
from specdec.drafters.block.drawn import Distributions, drawn_tree
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.scoring import SlotScores
from specdec.sampling.noise import round_noise
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree
from tests.block_tables import random_state, stub_batch
from tests.specdec.acceptance.test_acceptance import CPU, after, dirichlet, outputs, sequences

LAST = 1  # token of every text
# (vocabulary, nodes, depth, children)
CASES = [(3, 4, 2, 2), (3, 5, 2, 3), (2, 5, 3, 2), (4, 3, 2, 2)]


class Scripted:
    """All outcomes of all draws, a row each, in place of `sample_distinct`, and the probability of each row."""

    def __init__(self, vocabulary, growth):
        self.draws = min(growth.most_children, vocabulary)
        self.ways = torch.tensor([*permutations(range(vocabulary), self.draws)])
        parents, self.parents = 1, []
        for _ in range(growth.depth):
            self.parents.append(parents)
            parents = min(growth.num_tokens, parents * self.draws, growth.most_expanded)
        self.script = torch.tensor([*product(range(len(self.ways)), repeat=sum(self.parents))])
        self.weight, self.level = torch.ones(len(self.script), dtype=torch.float64), 0

    def __call__(self, scores, numbers, probs=None):
        first, count = sum(self.parents[: self.level]), scores.shape[1]
        assert count == self.parents[self.level] and numbers.shape[2] == self.draws
        tokens = self.ways[self.script[:, first : first + count]]  # [A, n, C]
        of_all = scores.softmax(-1)
        held = of_all.gather(2, tokens)
        left = 1 - held.cumsum(2) + held
        self.weight *= (held / left).prod(2).prod(1)
        self.level += 1
        probs.copy_(of_all)
        return tokens, held > 0


def every_draft(case, monkeypatch, seed=0, scale=1.5, width=None):
    """All drafts of a random state, and the probability of each."""
    vocabulary, nodes, depth, children = case
    growth = Growth(nodes, depth, width, children)
    scripted = Scripted(vocabulary, growth)
    monkeypatch.setattr(module, "sample_distinct", scripted)
    state = random_state(depth, vocabulary, seed=seed, scale=scale)
    batch = stub_batch([LAST] * len(scripted.script), vocabulary=vocabulary)
    draft = drawn_tree(batch, SlotScores.of(batch, state, depth), growth)
    assert abs(scripted.weight.sum() - 1) < 1e-12
    return draft, scripted.weight


def law(draft, row, p, depth):
    """(path, length, probability) of all that multi-branch rejection gives for one draft, by its own definition."""
    parents, tokens = draft.tree.parents[row].tolist(), draft.tokens[row].tolist()
    children = [
        [node for node, above in enumerate(parents) if node and above == parent] for parent in range(len(parents))
    ]
    inner = {node: place for place, node in enumerate(n for n, below in enumerate(children) if below)}

    def walk(node, path, reached):
        rest = after(p, torch.tensor([path], dtype=torch.int64).view(1, -1))[0]
        q = draft.probs[row, inner[node]].double() if children[node] else None
        for child in children[node]:
            share = min(1.0, float(rest[tokens[child]] / (q[tokens[child]] / q.sum())))
            yield from walk(child, (*path, tokens[child]), reached * share)
            reached *= 1 - share
            lower = (rest - q / q.sum()).clamp(min=0)
            rest = lower / lower.sum() if lower.sum() > 0 else rest
            q = q.index_fill(0, torch.tensor([tokens[child]]), 0.0)
        for token, mass in enumerate(rest.tolist()):
            yield (*path, token), reached * mass

    for path, mass in walk(0, (), 1.0):
        yield (*path, *[0] * (depth + 1 - len(path))), len(path), mass


def total_variation(draft, weight, p, depth):
    lines, lengths, masses = zip(
        *((line, length, float(share) * mass) for row, share in enumerate(weight) if share > 0
          for line, length, mass in law(draft, row, p, depth)), strict=True,
    )  # fmt: skip
    out = outputs(p, torch.tensor(lines), torch.tensor(lengths), torch.tensor(masses, dtype=torch.float64))
    return float((out - sequences(p)).abs().sum() / 2)


def targets(depth, vocabulary, seed):
    """The target's distributions after all beginnings of `depth` levels."""
    generator = torch.Generator().manual_seed(seed)
    return [dirichlet(vocabulary**d, vocabulary, 1.0, generator) for d in range(depth + 1)]


def shapes_of(draft):
    return {tuple(parents) for parents in draft.tree.parents.tolist()}


@pytest.mark.covering
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("seed", "width"), [(0, None), (1, None), (2, 2)])
def test_the_output_has_exactly_the_targets_distribution(case, seed, width, monkeypatch):
    draft, weight = every_draft(case, monkeypatch, seed, width=width)
    draft.tree.check()
    assert len(shapes_of(draft)) > 1 or case[1] < 5, "what was drawn decides about the shape"
    p = targets(case[2], case[0], seed + 7)
    assert total_variation(draft, weight, p, case[2]) < 1e-11


def test_pruning_drawn_nodes_is_seen(monkeypatch):
    """More are drawn than there is room for, and the best of them stay."""
    everything = lambda value, scores, size, draws: torch.full_like(value, draws, dtype=torch.int64)
    monkeypatch.setattr(module, "shared_out", everything)
    case = (3, 2, 2, 3)
    draft, weight = every_draft(case, monkeypatch)
    assert total_variation(draft, weight, targets(2, 3, 7), 2) > 1e-3


def test_marginals_reported_as_conditionals_are_seen(monkeypatch):
    add = Distributions.add
    monkeypatch.setattr(Distributions, "add", lambda self, q, has: add(self, q.mean(1, keepdim=True).expand_as(q), has))
    draft, weight = every_draft(CASES[0], monkeypatch)
    assert total_variation(draft, weight, targets(2, 3, 7), 2) > 1e-3


def test_siblings_in_the_order_of_their_values_are_seen(monkeypatch):
    """A draft's first child must be the one that was drawn first."""
    draft, weight = every_draft((3, 3, 1, 2), monkeypatch)
    p = targets(1, 3, 7)
    assert total_variation(draft, weight, p, 1) < 1e-11
    q = draft.probs[:, 0].gather(1, draft.tokens[:, 1:])
    exists = draft.tree.parents[:, 1:] >= 0
    order = torch.where(exists, q, -1.0).argsort(1, descending=True)
    assert (exists.sum(1) == 2).all()
    tokens = torch.cat([draft.tokens[:, :1], draft.tokens[:, 1:].gather(1, order)], 1)
    assert total_variation(replace(draft, tokens=tokens), weight, p, 1) > 1e-3


def sampled(rows, vocabulary, growth, seed=3, marginal=False):
    state = random_state(growth.depth, vocabulary, rank=0 if marginal else 2, seed=seed, dtype=torch.float32)
    batch = stub_batch([LAST + row % 3 for row in range(rows)], vocabulary=vocabulary, seed=seed)
    return drawn_tree(batch, SlotScores.of(batch, state, growth.depth, growth.candidates), growth)


@pytest.mark.parametrize("marginal", [False, True])
def test_the_rule_takes_each_rows_own_tree(marginal):
    """As it takes the tree of each row alone, which the host knows then."""
    rows, vocabulary = 64, 12
    draft = sampled(rows, vocabulary, Growth(10, 3, children=4), marginal=marginal)
    draft.tree.check()
    scores = 2 * torch.randn(rows, 11, vocabulary, generator=torch.Generator().manual_seed(1))
    noise = round_noise(5, range(rows), [3] * rows, CPU)
    together, lengths = child_by_child(draft, scores, noise, "reference"), set()
    for row in range(rows):
        nodes = [0] + [node for node in range(1, 11) if draft.tree.parents[row, node] >= 0]
        place = {node: i for i, node in enumerate(nodes)}
        tree = TokenTree((None, *(place[int(draft.tree.parents[row, node])] for node in nodes[1:])))
        # the numbers of a node's children are those of the widest tree
        numbers = noise.uniform(1 + 1, 3 * draft.tree.max_children)[row].view(3, -1)[:, : tree.max_children]
        own = Numbers(numbers[: tree.max_depth].flatten()[None], noise, row)
        alone = Draft(tree, draft.tokens[row : row + 1, nodes], draft.probs[row : row + 1, : len(tree.internal)], True)
        verdict = tree_distinct(alone, scores[row : row + 1, nodes], own)
        count = int(together.counts[row])
        assert int(verdict.counts) == count and int(verdict.next_tokens) == int(together.next_tokens[row])
        assert [nodes[node] for node in verdict.path[0, :count].tolist()] == together.path[row, :count].tolist()
        lengths.add(count)
    assert len(lengths) >= 3


class Numbers:
    """The numbers of one row of a round, with those that accept given."""

    def __init__(self, accept, noise, row):
        self._accept, self._noise, self._row = accept, noise, row

    def uniform(self, stream, count):
        return self._accept if int(stream) == 2 else self._noise.uniform(stream, count)[self._row : self._row + 1]


def test_a_row_is_the_same_alone_and_no_tree_is_larger_than_asked():
    growth = Growth(12, 4, children=5)
    together, alone = sampled(6, 12, growth), sampled(1, 12, growth)
    assert alone.tokens[0].equal(together.tokens[0]) and alone.tree.parents[0].equal(together.tree.parents[0])
    assert alone.probs[0].equal(together.probs[0])
    assert (together.tree.parents >= 0).sum(1).max() <= 12
    assert (together.tree.parents >= 0).sum(1).min() >= 6, "and hardly ever much smaller"
