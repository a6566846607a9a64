"""Best-first trees out of one block: the nodes that an exhaustive search finds, whatever the rows and the numbers."""

import heapq
from itertools import product

import pytest
import torch

from specdec.drafters.block import best_first as module
from specdec.drafters.block.best_first import best_first
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.scoring import SlotScores
from specdec.sampling.draws import top
from tests.block_tables import random_state, stub_batch


def grow(state, batch, growth, deepest=None):
    return best_first(batch, SlotScores.of(batch, state, growth.depth, growth.candidates), growth, deepest)


def paths_of_row(draft, row):
    """The path of tokens of each node that a row has, in the order of the nodes."""
    paths = {0: ()}
    for node, parent in enumerate(draft.tree.parents[row].tolist()):
        if node and parent >= 0:
            paths[node] = (*paths[parent], int(draft.tokens[row, node]))
    return [paths[node] for node in sorted(paths) if node]


def searched(state, batch, row, nodes, depth):
    """(value, path) of the best nodes by a search with a heap over all conditionals, and how far the next one is."""
    last, slots = batch.last_tokens()[row : row + 1], state.slots(stub_batch(batch.last_tokens()[row]))
    assert len(slots) == 1
    ids = range(slots.shape[2]) if state.ids is None else state.ids.tolist()
    found, queue = [], [(-float("inf"), (), last)]
    while queue and len(found) <= nodes + 1:
        value, path, token = heapq.heappop(queue)
        found.append((-value, path))
        if len(path) < depth:
            known = 0.0 if not path else -value
            likely = state.conditional(len(path), token)[0, 0].log_softmax(-1)
            for column, more in enumerate(likely.tolist()):
                if more > -float("inf"):
                    heapq.heappush(queue, (-(known + more), (*path, ids[column]), torch.tensor([[ids[column]]])))
    return found[1:]  # without the root


def check_row(state, batch, row, draft, nodes, depth):
    """The row's nodes are those of the search, up to ties at the end."""
    wanted, got = searched(state, batch, row, nodes, depth), paths_of_row(draft, row)
    assert len(got) == min(nodes, len(wanted)) and len(set(got)) == len(got)
    values = dict((path, value) for value, path in wanted)
    last = wanted[len(got) - 1][0]
    sure = {path for value, path in wanted[:nodes] if value > last + 1e-12}
    assert sure <= set(got) and all(abs(values.get(path, last) - last) < 1e-12 for path in set(got) - sure)
    order = [values.get(path, last) for path in got]
    assert all(a >= b - 1e-12 for a, b in zip(order, order[1:], strict=False)), "node n is the n-th best"


@pytest.mark.parametrize("part", range(10))
def test_the_tree_has_the_nodes_that_an_exhaustive_search_finds(part):
    """1,000 random cases: sizes, depths, vocabularies, drafters of marginals and of conditionals, sure and unsure."""
    for case in range(100):
        draws = torch.Generator().manual_seed(1000 * part + case)
        pick = lambda low, high, draws=draws: int(torch.randint(low, high + 1, (), generator=draws))
        depth, vocabulary, nodes = pick(1, 4), pick(2, 9), pick(1, 24)
        drafted = pick(1, vocabulary)
        ids = None if drafted == vocabulary and case % 2 else torch.randperm(vocabulary, generator=draws)[:drafted]
        scale = (0.3, 1.0, 3.0)[pick(0, 2)]
        state = random_state(depth + pick(0, 1), vocabulary, drafted, pick(0, 2), case, scale, ids=ids)
        batch = stub_batch([pick(0, vocabulary - 1) for _ in range(2)], vocabulary=vocabulary)
        draft = grow(state, batch, Growth(nodes, depth))
        draft.tree.check()
        for row in range(2):
            check_row(state, batch, row, draft, nodes, depth)


def test_a_large_tree_is_the_one_that_the_search_finds():
    state = random_state(7, 40, seed=3, scale=1.5)
    batch = stub_batch([5, 11], vocabulary=40)
    for nodes in (16, 64, 256):
        draft = grow(state, batch, Growth(nodes, 7))
        draft.tree.check()
        for row in range(2):
            check_row(state, batch, row, draft, nodes, 7)


def test_a_node_is_dropped_by_the_planted_bug_and_seen(monkeypatch):
    """A level that keeps too few nodes."""
    monkeypatch.setattr(module, "top", lambda values, count: top(values, max(1, count // 4)))
    state, batch = random_state(3, 8, seed=2), stub_batch([1], vocabulary=8)
    with pytest.raises(AssertionError):
        check_row(state, batch, 0, grow(state, batch, Growth(16, 3)), 16, 3)


@pytest.mark.parametrize("seed", range(4))
def test_jetspecs_tree_has_the_best_paths_of_the_likeliest_tokens_of_each_depth(seed):
    """Its rule by definition (arXiv 2606.18394): all paths of W tokens a depth, by their summed log-probability."""
    width, depth, nodes = 3, 4, 14
    state, batch = random_state(depth, 12, rank=0, seed=seed), stub_batch([2], vocabulary=12)
    likely = [state.slots(batch)[0, slot].log_softmax(-1).topk(width) for slot in range(depth)]
    values = {}
    for ranks in (ranks for count in range(1, depth + 1) for ranks in product(range(width), repeat=count)):
        path = tuple(int(likely[slot].indices[rank]) for slot, rank in enumerate(ranks))
        values[path] = sum(float(likely[slot].values[rank]) for slot, rank in enumerate(ranks))
    best = sorted(values, key=lambda path: -values[path])[:nodes]
    assert paths_of_row(grow(state, batch, Growth(nodes, depth, children=width)), 0) == best


def test_marginals_in_place_of_conditionals_are_seen():
    state, batch = random_state(3, 8, seed=2), stub_batch([1], vocabulary=8)
    right, conditional = grow(state, batch, Growth(16, 3)), state.conditional
    check_row(state, batch, 0, right, 16, 3)
    state.conditional = lambda level, tokens, *more: conditional(level, tokens * 0, *more)
    wrong = grow(state, batch, Growth(16, 3))
    state.conditional = conditional
    with pytest.raises(AssertionError):
        check_row(state, batch, 0, wrong, 16, 3)


def test_a_row_grows_as_deep_as_it_may_and_is_the_same_among_others():
    state, growth = random_state(4, 8, seed=4), Growth(12, 4)
    last, deepest = [1, 2, 3, 4, 4], torch.tensor([0, 1, 2, 9, 3])
    batch = stub_batch(last, 8)
    together = grow(state, batch, growth, deepest)
    together.tree.check()
    for row, token in enumerate(last):
        alone = grow(state, stub_batch([token], 8), growth, deepest[row : row + 1])
        assert alone.tokens[0].equal(together.tokens[row])
        assert alone.tree.parents[0].equal(together.tree.parents[row])
        if depth := min(4, int(deepest[row])):
            check_row(state, batch, row, together, 12, depth)
        else:
            assert paths_of_row(together, row) == []


def test_a_wide_enough_approximation_is_exact_and_a_narrow_one_says_what_it_is():
    state, batch = random_state(4, 30, seed=5, scale=1.5), stub_batch([3, 7], vocabulary=30)
    exact = grow(state, batch, Growth(20, 4))
    for growth in (Growth(20, 4, 20, 20, 30), Growth(20, 4, 40, 40), Growth(20, 4, width=20)):
        again = grow(state, batch, growth)
        assert again.tokens.equal(exact.tokens) and again.tree.parents.equal(exact.tree.parents)
    narrow = Growth(20, 4, 4, 3, 8)
    draft = grow(state, batch, narrow)
    draft.tree.check()
    assert len(paths_of_row(draft, 0)) == 20 and draft.tree.tables.depth.amax() <= 4
    mass = lambda draft: sum(
        value for value, path in searched(state, batch, 0, 4000, 4) if path in set(paths_of_row(draft, 0))
    )
    assert Growth(20, 4).exact and not narrow.exact
    assert "the 8 likeliest tokens of each slot" in narrow.describe() and "4 nodes" in narrow.describe()
    assert len(set(paths_of_row(draft, 0)) & set(paths_of_row(exact, 0))) >= 10 and mass(draft) != 0


def test_candidates_are_looked_at_alone_and_mean_the_targets_tokens():
    ids = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:40]
    state, batch = random_state(3, 50, 40, 2, 6, 2.0, ids=ids), stub_batch([3, 7], vocabulary=50)
    draft = grow(state, batch, Growth(24, 3, candidates=8))
    first = state.conditional(0, batch.last_tokens()) if state.slots(batch) is not None else None
    allowed = [set(ids[first[1, 0].topk(8).indices].tolist())]
    allowed += [set(ids[state.slots(batch)[1, level].topk(8).indices].tolist()) for level in (1, 2)]
    assert all(token in allowed[depth] for path in paths_of_row(draft, 1) for depth, token in enumerate(path))
    assert any(len(path) == 3 for path in paths_of_row(draft, 1))


def test_more_levels_than_slots_are_refused():
    with pytest.raises(ValueError, match="5 levels .* the drafter has 4"):
        grow(random_state(4, 8), stub_batch([1], vocabulary=8), Growth(8, 5))


@pytest.mark.parametrize("numbers", [(0, 3), (4, 0), (4, 3, 0), (4, 3, 2, 0), (4, 3, 2, 2, 0), (4.0, 3), (4, 3, -1)])
def test_numbers_below_one_are_refused_by_name(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        Growth(*numbers)


def test_broken_logits_are_reported_for_their_row():
    state = random_state(3, 8, seed=2)
    state._unary[1, 4, 2] = float("nan")
    batch = stub_batch([1, 4], vocabulary=8)
    grow(state, batch, Growth(8, 3))
    [(about, what)] = batch.faults
    assert about.any(1).tolist() == [False, True] and "NaN" in what
