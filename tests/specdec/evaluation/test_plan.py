"""Settings become plans, and what is wrong in them is named."""

from pathlib import Path

import pytest

from specdec.evaluation.plan import MethodPlan, plan_of, read_plan

ROOT = Path(__file__).parents[3]
MODEL = {"target": "a/b", "methods": ["lookup"]}


def test_short_and_long_forms_mean_the_same(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "models:\n  tiny: {target: a/b, methods: {lookup: lookup, x: {drafter: c/d, start: warm}}}\ntasks: a.jsonl\n"
        "temperatures: [0, 1]\nbatch_sizes: 4\n"
    )
    plan = plan_of(read_plan(tmp_path / "plan.yaml"))
    assert plan.models[0].methods == (MethodPlan("lookup"), MethodPlan("c/d", "x", start="warm"))
    assert (plan.tasks, plan.temperatures, plan.batch_sizes) == (("a.jsonl",), (0, 1), (4,))
    assert plan_of(plan.as_dict()) == plan
    assert MethodPlan("c/d", tree="auto", through="engine").name == "d auto engine"


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"models": [MODEL], "temprature": 1}, "an evaluation has no setting 'temprature'"),
     ({"models": [MODEL | {"x": 1}]}, "a model has no setting 'x'"), ({"models": []}, "at least one model"),
     ({"models": [{"target": "a", "methods": ["lookup", "lookup"]}]}, "need different names"),
     ({"models": [{"target": "a", "methods": [{"drafter": "b", "start": "hot"}]}]}, "start of a method must be one of"),
     ({"models": [{"target": "a", "methods": [{"drafter": "b", "tree": "x"}]}]}, "must be auto or absent"),
     ({"models": [{"target": "a", "methods": {"transformers generate": "b"}}]}, "one of the baselines"),
     ({"models": [MODEL], "temperatures": [-1]}, "temperatures must be numbers of at least 0"),
     ({"models": [MODEL], "batch_sizes": [0]}, "batch_sizes must be integers of at least 1, got 0"),
     ({"models": [MODEL], "tasks": ["x/a.jsonl", "y/a.jsonl"]}, "need different names"),
     ({"models": [{"methods": []}]}, "a model: .*target"), ({"models": [MODEL], "sampling": "x"}, "stated or model")],
)  # fmt: skip
def test_what_is_wrong_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        plan_of(settings)


def test_the_example_is_a_plan_of_under_ten_lines():
    path = ROOT / "scripts/examples/compare.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    (model,) = plan_of(read_plan(path)).models
    assert len(lines) < 10 and [method.name for method in model.methods] == ["draft", "lookup", "draft auto"]
    assert all((ROOT / folder).is_dir() for folder in (model.target, model.methods[0].drafter))


@pytest.mark.parametrize(("text", "said"), [("- a", "must hold settings by name, got list"), ("a: [", "is no YAML")])
def test_files_that_hold_no_settings_are_named(tmp_path, text, said):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_plan(tmp_path / "p.yaml")
