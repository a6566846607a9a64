"""`specdec audit`: a table, a result and an exit status."""

import json

import pytest

from specdec.__main__ import main
from specdec.cli.results import read_result

SMALL = ("--max-new-tokens", "8", "--samples", "300", "--tokens", "2", "--batch", "300", "--limit", "1", "--device",
         "cpu", "--mode", "eager")  # fmt: skip
WRONG = "tests.specdec.generation.test_generators:accepts_always"


def run(folders, tmp_path, *more):
    """The status of a small audit of a draft model."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "def add(a, b):"}) + "\n")
    pair = ("--target", str(folders / "target"), "--drafter", str(folders / "draft"), "--num-tokens", "2")
    return main(["audit", *pair, "--prompts", str(prompts), "--json", str(tmp_path / "r.json"), *SMALL, *more])


def test_an_audit_that_passes(folders, tmp_path, capsys):
    assert run(folders, tmp_path) == 0
    printed, result = capsys.readouterr().out, read_result(tmp_path / "r.json")
    assert "audit: passed" in printed and "the control" in printed and "was found" in printed
    assert result["kind"] == "audit" and result["verdict"] == "passed"
    assert [method["name"] for method in result["methods"]] == ["greedy", "sampled"]
    assert {record["part"] for record in result["records"]} == {"sampled", "control"}
    assert result["methods"][1]["control_failed"] and 0 < result["methods"][1]["wrong_by"] < 1


def test_a_wrong_rule_fails_with_status_one(folders, tmp_path, capsys):
    assert run(folders, tmp_path, "--parts", "sampled", "--rule", WRONG) == 1
    assert "audit: failed" in capsys.readouterr().out and read_result(tmp_path / "r.json")["verdict"] == "failed"


def test_what_could_not_be_found_has_status_three(folders, tmp_path, capsys):
    assert run(folders, tmp_path, "--parts", "sampled", "--top-k", "1") == 3
    assert "audit: inconclusive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--rule", "fast"), "--rule must be one of greedy, lossless"), (("--rule", "a.b:c"), "--rule a.b:c: No module"),
     (("--level", "3"), "level must lie in (0, 1), got 3.0"), (("--samples", "0"), "--samples must be at least 1"),
     (("--samples", "9"), "samples must be at least 64, got 9"), (("--kv-dtype", "int3"), "int3")],
)  # fmt: skip
def test_bad_input_is_one_line_with_status_two(folders, tmp_path, capsys, options, said):
    assert run(folders, tmp_path, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
