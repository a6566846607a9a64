"""`specdec evaluate`: one file compares everything; a run that was cut goes on; processes share the jobs."""

import json

import pytest

from specdec.__main__ import main
from specdec.cli.results import read_result
from specdec.evaluation.methods import OURS, PLAIN

PLAN = """models:
  mine: {{target: {target}, methods: ["{draft}", {{drafter: "lookup:length=3", name: lookup}}]}}
tasks: [{task}]
temperatures: [0, 1]
batch_sizes: [1, 2]
max_new_tokens: 6
repeats: 2
"""


@pytest.fixture
def plan(folders, tmp_path):
    task = tmp_path / "talks.jsonl"
    rows = [
        {"question_id": 7, "category": "talk", "turns": ["Hi", "And?"]},
        {"prompt": "def add(a, b):", "kind": "code"},
    ]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(target=folders / "target", draft=folders / "draft", task=task))
    return path


def evaluate(plan, *more):
    output = plan.parent / "out"
    assert main(["evaluate", str(plan), "--output", str(output), "--device", "cpu", "--warm-up", "1", *more]) == 0
    return output


def test_everything_is_compared_and_a_run_that_was_cut_goes_on(plan, capsys):
    output = evaluate(plan)
    result = read_result(output / "result.json")
    names = {OURS, PLAIN, "draft", "draft in transformers", "lookup", "lookup:length=3 in transformers"}
    for batch in (1, 2):
        of_batch = [row for row in result["methods"] if row["batch"] == batch]
        alone = set() if batch == 1 else {name for name in names if "in transformers" in name}
        assert {(row["name"], row["kind"], row["temperature"]) for row in of_batch} == {
            (name, kind, t) for name in names - alone for kind in ("talk", "code", "all") for t in (0, 1)
        }
    assert all(row["identical"] for row in result["methods"] if row["temperature"] == 0)
    assert {(r["prompt"], r["turn"]) for r in result["records"] if r["kind"] == "talk"} == {(7, 0), (7, 1)}
    used = result["models"]["mine"]["sampling"]
    assert used["1"][PLAIN] == used["1"]["draft"] and used["1"]["draft"]["top_k"] == 0
    assert any("left out" in note for note in result["notes"])
    records = output / "records-0.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2 * 2 * 2  # repeats, temperatures, batch sizes, questions
    records.write_text("".join(lines[:-2]) + lines[-2][:50])
    evaluate(plan)
    again = records.read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2] and len(again) == len(lines)
    assert len(read_result(output / "result.json")["records"]) == len(result["records"])
    capsys.readouterr()
    assert main(["evaluate", str(plan), "--output", str(output), "--device", "cpu", "--repeats", "3"]) == 2
    assert "was made with other settings" in capsys.readouterr().err


def test_processes_share_the_jobs(plan, monkeypatch):
    """Each one takes every other job; the first one, which comes last here, finds all of them."""

    class State:
        num_processes, device = 2, "cpu"
        wait_for_everyone = staticmethod(lambda: None)

        def __init__(self, cpu):
            self.process_index = int(rank)

    monkeypatch.setattr("accelerate.PartialState", State)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        output = evaluate(plan, "--temperature", "0", "--batch", "1", "--repeats", "1", "--no-transformers")
    keys = [{json.loads(line)["job"] for line in path.read_text().splitlines()} for path in output.glob("records-*")]
    assert len(keys) == 2 and not keys[0] & keys[1] and all(keys)
    assert {r["kind"] for r in read_result(output / "result.json")["records"]} == {"talk", "code"}


@pytest.mark.parametrize(
    ("given", "said"),
    [((), "a plan with models, or --target, is needed"), (("--drafter", "lookup"), "needs --target"),
     (("--target", "x", "--repeats", "0"), "repeats must be integers of at least 1"),
     (("nowhere.yaml",), "nowhere.yaml")],
)  # fmt: skip
def test_bad_input_is_one_line(given, said, tmp_path, capsys):
    assert main(["evaluate", *given, "--output", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
