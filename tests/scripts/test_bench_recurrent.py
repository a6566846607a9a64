"""The benchmark of recurrent layers: its path on a CPU, and its bars."""

import json

import pytest

from scripts import bench_recurrent
from scripts.bench_recurrent import FLA, KINDS, OURS, REFERENCE, bars_of, tree_of


def test_every_form_runs_and_equals_the_reference(tmp_path, capsys):
    path = tmp_path / "result.json"
    options = ["--shape", "toy", "--rows", "2", "--nodes", "5", "--calls", "1", "--device", "cpu", "--bars"]
    bench_recurrent.main([*options, "--json", str(path)])
    result = json.loads(path.read_text())
    ran = [row for row in result["methods"] if row["error"] is None]
    assert {row["kind"] for row in ran if row["name"] == REFERENCE} == {*KINDS}
    assert all(row["apart"] is None or row["apart"] < 1e-2 for row in ran)
    ours = [row for row in ran if row["name"] == OURS]  # where Triton's interpreter runs
    assert not ours or {row["form"] for row in ours} == {"tree", "chain", "replay"}
    assert "state space" in capsys.readouterr().out


def row(name, form, seconds, **other):
    about = {"kind": "delta rule", "rows": 8, "name": name, "form": form, "error": None, "apart": 1e-6}
    return about | {"seconds": seconds} | other


def test_the_bar_is_a_chain_of_fla():
    speed, error = bars_of([row(OURS, "tree", 0.9), row(FLA, "chain", 1.0), row(OURS, "chain", 9.0)], True)
    assert speed["value"] == 0.9 and speed["met"] and error["met"]
    assert bars_of([row(OURS, "tree", 1.1), row(FLA, "chain", 1.0)], True)[0]["met"] is False
    assert bars_of([row(OURS, "tree", 1.1)], True)[0]["met"] is None, "without fla nothing is judged"
    assert bars_of([row(OURS, "tree", 1.1, apart=1e-2)], True)[1]["met"] is False


def test_numbers_below_one_are_refused():
    with pytest.raises(SystemExit):
        bench_recurrent.main(["--shape", "toy", "--rows", "0"])
    assert tree_of(1).size == 1 and tree_of(64).size == 64
