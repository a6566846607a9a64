"""Predictions follow from costs and acceptance as they should, and survive JSON."""

import json

import pytest

import specdec
from specdec import TokenTree
from specdec.evaluation.diagnosis import Diagnosis, ShapeCosts, diagnosis_of, expected_largest
from specdec.evaluation.doctor import chains_for, falling, trees_for, widest_for
from specdec.planning.costs import Costs
from specdec.report.stats import RoundStats
from tests.families import build, noisy_copy
from tests.learned import eagle3

PLAIN = ShapeCosts("plain", 0, 0, (1.0, 1.0), {1: 0.01, 8: 0.02}, {1: 0.05, 8: 0.1})
CHAIN = ShapeCosts("chain 3", 3, 3, (4.0, 2.0), {1: 0.015, 8: 0.1}, {1: 0.06, 8: 0.2}, (None, 0, 1, 2))
COSTS = {batch: Costs(0.008, 0.1, (1, 4), (1.0, 1.2)) for batch in (1, 8)}
FOUND = Diagnosis(PLAIN, (CHAIN,), COSTS, {"code": [0.8, None]}, 33.0)


def test_a_speedup_is_that_of_whole_calls():
    """33 tokens: 32 plain steps after the first; of the chain 12.375 rounds on average, one of them the first."""
    plain, chain = 0.05 + 32 * 0.01, 0.06 + (33 * (1 / 4 + 1 / 2) / 2 - 1) * 0.015
    assert FOUND.speedup(CHAIN, 1) == pytest.approx(plain / chain)
    slowest = expected_largest([33 / 4, 33 / 2], 8)
    assert 16.4 < slowest < 16.5, "one of eight texts is nearly always of the slow kind"
    assert FOUND.speedup(CHAIN, 8) == pytest.approx((0.1 + 32 * 0.02) / (0.2 + (slowest - 1) * 0.1))
    assert CHAIN.mean_tokens == pytest.approx(8 / 3)


def test_the_verdict_says_where_speculation_stops_paying():
    said = FOUND.verdict()
    assert said[0].startswith("batch 1: expect 1.6") and said[1].startswith("batch 8: do not draft")
    assert said[2] == f"speculation stops paying at about {FOUND.stops_at():.0f} prompts at a time"


def test_a_diagnosis_survives_json():
    assert diagnosis_of(json.loads(json.dumps(FOUND.as_dict()))) == diagnosis_of(FOUND.as_dict())
    assert diagnosis_of(FOUND.as_dict()).lines() == FOUND.lines()


def test_shapes_are_those_that_the_drafter_can_draft():
    chains = specdec.ModelDrafter(noisy_copy("llama"), 5)
    names = [shape.name for shape in chains_for(chains)]
    assert names[0] == "own" and "chain 5" not in names and "chain 8" in names
    assert [shape.name for shape in chains_for(specdec.PromptLookupDrafter())] == ["own"]
    exits = specdec.EarlyExitDrafter(specdec.ModelRunner(build("llama")), 1)
    assert all(shape.levels <= (exits.traits.max_depth or 99) for shape in chains_for(exits))
    shallow = eagle3(specdec.ModelRunner(build("llama")))
    deepest = shallow.traits.max_depth
    assert deepest and all(shape.levels <= deepest for shape in (*chains_for(shallow), widest_for(shallow)))
    assert widest_for(chains).levels == 3


def test_trees_follow_the_ranks():
    drafter = specdec.ModelDrafter(noisy_copy("llama"), 5)
    passed = ((4, 0), (4, 1), (4, None))
    rounds = RoundStats((9,), (2,), (3,), (), depths=(3,), ranks=(passed,))
    trees = trees_for(falling(rounds), COSTS[1], drafter)
    assert trees and all(isinstance(shape.tree, TokenTree) and not shape.tree.is_chain for shape in trees)
    nothing = RoundStats((9,), (0,), (1,), (), depths=(3,), ranks=(((4, None),),))
    assert trees_for(falling(nothing), COSTS[1], drafter) == []
