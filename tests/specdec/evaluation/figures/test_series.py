"""Numbers of figures: families of drafts by length and nodes, without what was not measured."""

from dataclasses import replace

import pytest

from specdec.evaluation.figures.series import by_budget, by_length, by_task, families_of, speedup_of
from specdec.evaluation.methods import OURS
from specdec.evaluation.runs import Run
from specdec.report.stats import RoundStats

STEPS = RoundStats((0,) * 6, (0,) * 6, (1,) * 6, seconds=(0.01,) * 5)


def run(method, seconds, rounds, kind="code"):
    return Run(method, kind, 0.0, 0, 0, 6, "x", seconds, rounds, group=f"{kind} 0")


def chain(length, levels=None):
    return RoundStats((length,) * 2, (2, 2), (3, 3), (0.01,), depths=(levels or length,) * 2)


PLAIN = run(OURS, 1.0, STEPS)
RUNS = [PLAIN, run("two", 0.5, chain(2)), run("four", 0.8, chain(4)), run("tree", 0.4, chain(8, 3)),
        run("theirs", 3.0, None)]  # fmt: skip


def test_lengths_are_those_of_one_family_of_chains():
    families = {"two": "d", "four": "d", "tree": "t"}
    found = by_length(RUNS, OURS, families)
    assert {family: {n: one.value for n, one in of.items()} for family, of in found.items()} == {"d": {2: 2.0, 4: 1.25}}
    assert by_length(RUNS, OURS, {"two": "d", "four": "e"}) == {}, "a line needs two lengths"
    assert by_length(RUNS[1:], OURS, families) == {}, "there is no speedup without a baseline"


def test_budgets_count_the_root():
    found = by_budget(RUNS, {"two": "d", "four": "d"})
    assert {name: list(of) for name, of in found.items()} == {"d": [3, 5], "tree": [9]}
    assert found["tree"][9].value == 3.0


def test_families_are_drafters_of_any_size():
    model = {"name": "m", "methods": [
        {"name": "a", "drafter": "block:path=x/y,nodes=8", "tree": None, "rule": None},
        {"name": "b", "drafter": "block:path=x/y,nodes=16", "tree": None, "rule": None},
        {"name": "c", "drafter": "x/y", "tree": "auto", "rule": "typical"},
    ]}  # fmt: skip
    settings = {"models": [model, {"name": "other", "methods": []}]}
    assert families_of(settings, "m") == {"a": "block:path=y", "b": "block:path=y", "c": "y auto typical"}
    assert families_of(settings, "other") == {} and families_of({"repeats": 1}, "") == {}


def test_a_kind_that_a_method_did_not_decode_has_no_value():
    more = [*RUNS, replace(PLAIN, kind="prose", group="prose 0")]
    found = by_task(more, OURS, speedup_of)
    assert found["two"]["prose"] is None and found["two"]["code"].value == pytest.approx(2.0)
