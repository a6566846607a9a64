"""The automatic policy on a simulated machine: times are arithmetic, acceptance is drawn with a seed, and nothing here
looks at a clock.
"""

import random

import pytest

from specdec.planning.adaptive import (
    FEW_LENGTHS,
    LENGTHS,
    TREE_DEPTHS,
    TREE_SIZES,
    AdaptivePolicy,
    CostModel,
    grown_paths,
    shape_from,
)
from specdec.planning.costs import Costs
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, FixedPolicy, shape_of
from specdec.planning.tree_search import optimal_tree
from specdec.trees.tree import TokenTree
from tests.specdec.planning.test_tree_search import tree_speedup


class Simulated:
    """Rounds of a drafter whose child of rank r is taken with `acceptance[r]`, on a machine with the given costs."""

    def __init__(self, policy, acceptance, draft=0.1, node=0.02, seed=0, noise=0.0):
        self.policy, self.acceptance, self.draft, self.node, self.noise = policy, acceptance, draft, node, noise
        self.draws, self.tokens, self.time, self.shapes = random.Random(seed), 0, 0.0, []

    def seconds(self, shape):
        if shape == PLAIN:
            cost = 1.0
        elif shape == DRAFTERS_OWN:
            cost = 1.4
        else:
            cost = 1 + self.draft * shape.tree.max_depth + self.node * (shape.tree.size - 1)
        return 0.01 * cost * (1 + self.noise * self.draws.random())

    def round(self):
        shape = self.policy.next()
        passed, tree, node = [], shape.tree or TokenTree.chain(4), 0
        while shape != PLAIN and tree.children[node]:
            u, rank = self.draws.random(), None
            for r in range(len(tree.children[node])):
                u -= self.acceptance[r] if r < len(self.acceptance) else 0.0
                if u < 0:
                    rank = r
                    break
            passed.append((len(tree.children[node]), rank))
            if rank is None:
                break
            node = tree.children[node][rank]
        tokens, seconds = tree.depths[node] + 1, self.seconds(shape)
        self.policy.observe(shape, seconds if self.shapes else None, [tuple(passed)], tokens)
        self.tokens, self.time = self.tokens + tokens, self.time + seconds
        self.shapes.append(shape)

    def run(self, tokens):
        before, began = self.tokens, self.time
        while self.tokens < before + tokens:
            self.round()
        return (self.tokens - before) / ((self.time - began) / 0.01)


@pytest.mark.parametrize("shapes", ["tree", "chain", "own"])
@pytest.mark.parametrize("seed", range(5))
def test_a_drafter_that_is_always_wrong_costs_less_than_a_twentieth(shapes, seed):
    assert (
        Simulated(AdaptivePolicy(CostModel(), shapes, 5), [0.0], draft=0.25, seed=seed, noise=0.2).run(160) > 0.95 / 1.1
    )  # the noise alone averages 1.1
    assert Simulated(AdaptivePolicy(CostModel(), shapes, 5), [0.0], draft=0.25, seed=seed).run(160) > 0.95


@pytest.mark.covering
@pytest.mark.parametrize("acceptance", [[0.9, 0.05], [0.7, 0.15, 0.05], [0.5, 0.2, 0.1]])
@pytest.mark.parametrize("shapes", ["tree", "chain"])
def test_it_comes_close_to_the_best_fixed_shape(acceptance, shapes):
    runs = [Simulated(AdaptivePolicy(CostModel(), shapes, 5), acceptance, seed=seed).run(600) for seed in range(6)]
    costs = Costs(0.01, 0.1, (1, 2), (1.0, 1.02))
    best = optimal_tree(acceptance if shapes == "tree" else acceptance[:1], 24, 6, costs)
    assert sum(runs) / len(runs) > 0.93 * tree_speedup(best, [acceptance], costs)


def test_it_returns_to_drafting_when_drafting_pays_again():
    simulated = Simulated(AdaptivePolicy(CostModel(), "chain", 5), [0.0])
    simulated.run(100)
    assert simulated.shapes[-5:].count(PLAIN) >= 4
    simulated.acceptance = [0.9]
    simulated.run(250)
    assert PLAIN not in simulated.shapes[-10:]
    simulated.acceptance = [0.0]
    simulated.run(250)
    assert simulated.shapes[-10:].count(PLAIN) >= 8


def test_the_machine_learns_what_a_level_and_a_node_cost():
    machine, draws = CostModel(), random.Random(0)
    machine.learn(PLAIN, 0.02)
    for _ in range(200):
        shape = shape_of(
            draws.choice(
                [
                    TokenTree.chain(2),
                    TokenTree.chain(5),
                    TokenTree.from_widths((3, 2)),
                    TokenTree.from_widths((4, 2, 1)),
                ]
            )
        )
        machine.learn(shape, 0.02 * (1 + 0.3 * shape.tree.max_depth + 0.05 * (shape.tree.size - 1)))
    assert machine.draft == pytest.approx(0.3, abs=0.03) and machine.node == pytest.approx(0.05, abs=0.01)
    machine.learn(PLAIN, 5.0)  # another program had the machine for a moment
    assert machine.step < 0.03


def test_what_a_machine_learned_serves_the_next_call():
    machine = CostModel()
    Simulated(AdaptivePolicy(machine, "chain", 5), [0.8]).run(50)
    assert (
        AdaptivePolicy(machine, "chain", 5).next() != PLAIN and AdaptivePolicy(CostModel(), "chain", 5).next() == PLAIN
    )


def test_shapes_are_named_and_fit_the_room_that_is_reserved():
    for depth in TREE_DEPTHS:
        paths = grown_paths(((6, 2, 1, 0), (7, 1, 0, 0), (8, 1, 0, 0)), depth)
        for size in TREE_SIZES:
            assert (
                shape_from(paths[: size - 1]).tree.max_depth <= depth
                and shape_from(paths[: size - 1]).tree.size <= size
            )
    assert (
        max(TREE_SIZES) - 1 <= AdaptivePolicy(CostModel(), "tree", 1).max_tokens
        and max(LENGTHS) <= AdaptivePolicy(CostModel(), "chain", 1).max_tokens
    )
    assert (
        shape_of(TokenTree.chain(3)).name == "chain 3" and shape_of(TokenTree.from_widths((2, 2))).name == "tree 7 x 2"
    )
    assert shape_from(()) == shape_of(TokenTree.chain(0)) == PLAIN


def test_a_shape_that_was_timed_goes_by_its_own_times():
    machine = CostModel()
    machine.learn(PLAIN, 0.01)
    for _ in range(12):
        machine.learn(shape_of(TokenTree.chain(4)), 0.02)
        machine.learn(shape_of(TokenTree.kary(2, 4)), 0.05)
    assert machine.cost(4, 4) == pytest.approx(2.0, abs=0.1) and machine.cost(4, 30) == pytest.approx(5.0, abs=0.7)


def test_a_fixed_policy_never_changes():
    policy = FixedPolicy(DRAFTERS_OWN, 4)
    policy.observe(DRAFTERS_OWN, 1.0, [()], 1)
    assert policy.next() == DRAFTERS_OWN


@pytest.mark.parametrize("shapes", ["tree", "chain"])
@pytest.mark.parametrize("acceptance", [[0.9], [0.5], [0.1]])
def test_few_shapes_are_short_chains_and_lose_little(shapes, acceptance):
    few, all_shapes = (
        Simulated(AdaptivePolicy(CostModel(), "chain", 5, None, few), acceptance) for few in (True, False)
    )
    few.policy = AdaptivePolicy(CostModel(), shapes, 5, None, True)
    assert few.run(600) > 0.9 * all_shapes.run(600)
    names = {shape.name for shape in few.shapes}
    assert names <= {"plain"} | {f"chain {n}" for n in FEW_LENGTHS} and few.policy.max_tokens == max(FEW_LENGTHS)
    assert few.policy.few_shapes and not all_shapes.policy.few_shapes and FixedPolicy(PLAIN, 0).few_shapes


@pytest.mark.covering
@pytest.mark.parametrize("shapes", ["tree", "chain"])
@pytest.mark.parametrize("acceptance", [[0.97], [0.9, 0.05], [0.1]])
def test_where_passes_cost_the_same_for_any_number_of_tokens_drafts_are_long(shapes, acceptance):
    """As over weights that cross a bus, where a level of drafting is a hundredth of a pass and a node costs nothing."""
    runs = {}
    for most in (0, 512):
        simulated = [
            Simulated(AdaptivePolicy(CostModel(), shapes, 5, None, False, most), acceptance, 0.01, 0.0, seed, 0.05)
            for seed in range(4)
        ]
        runs[most] = sum(one.run(400) for one in simulated) / 4
    drafted = [shape.tree.max_depth for one in simulated for shape in one.shapes[10:] if shape != PLAIN]
    assert runs[512] > 0.98 * runs[0]
    if acceptance[0] > 0.5:
        assert runs[512] > 1.05 * runs[0] and sum(depth >= 12 for depth in drafted) > 0.8 * len(drafted)


def test_long_drafts_are_as_deep_as_the_drafter_and_as_large_as_the_rows_allow():
    for most, deepest, largest in ((512, 14, 127), (100, None, 95), (0, None, 31)):
        policy = AdaptivePolicy(CostModel(), "tree", 5, deepest, False, most)
        simulated = Simulated(policy, [0.97], 0.01, 0.0)
        simulated.run(500)
        sizes = [shape.tokens for shape in simulated.shapes]
        assert policy.max_tokens == largest >= max(sizes)
        depths = [shape.tree.max_depth for shape in simulated.shapes if shape.tree is not None]
        assert max(depths) == {512: 14, 100: 48, 0: 12}[most]


def test_what_nodes_do_not_cost_is_not_charged_to_levels():
    """All rounds have one shape, so its time could be of levels or nodes: a negative cost of one is no cost of the
    other.
    """
    machine = CostModel()
    machine.learn(PLAIN, 0.01)
    for _ in range(30):
        machine.learn(shape_of(TokenTree.kary(2, 4)), 0.01)
    assert min(machine.fixed, machine.draft, machine.node) >= 0 and machine.cost(12, 12) < 1.3
