"""The comparison of tree="auto" with fixed shapes runs from end to end on next to nothing, and resumes."""

import json

import torch

from scripts import bench_auto_tree
from scripts.bench_auto_tree import AUTO, DRAFT, HEADS, PLAIN, bars_of, main, texts_of
from specdec.cli.results import read_result
from tests.scripts.test_bench_medusa import arguments, sources  # noqa: F401

torch.set_num_threads(1)


def test_it_sweeps_measures_beside_and_resumes(sources, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(bench_auto_tree, "LENGTHS", {HEADS: (1, 2), DRAFT: (1, 3)})
    monkeypatch.setattr(bench_auto_tree, "SIZES", (4, 8))
    monkeypatch.setattr(bench_auto_tree, "MOST_WARM", 2)
    file, folder = tmp_path / "result.json", tmp_path / "runs"
    options = [*arguments(sources, folder), "--passes", "1", "--beside", "2", "--temperatures", "0.7"]
    main([*options, "--stages-only"])
    assert json.loads((folder / "trees.json").read_text())["acceptance"] and not file.exists()
    main([*options, "--batches", "2", "--seconds", "0", "--json", str(file)])
    assert not read_result(file)["complete"] and read_result(file)["methods"] == []
    main([*options, "--batches", "2", "--json", str(file)])
    result = read_result(file)
    assert result["complete"] and {row["name"] for row in result["methods"]} == {HEADS, DRAFT}
    for row in result["methods"]:
        assert set(row["tokens_per_second"]) == {PLAIN, row["winner"], AUTO} and len(row["each"]) == 2
        assert {"chain 1"} < set(row["sweep"]) and row["batch"] == 2
    assert len(result["bars"]) == 4 and "auto/best" in capsys.readouterr().out.splitlines()[-4]
    monkeypatch.setattr(bench_auto_tree, "measure", None)  # nothing that is done is done again
    main([*options, "--batches", "2", "--json", str(file)])
    assert read_result(file)["methods"] == result["methods"]


def test_texts_are_of_all_kinds_in_turn(tmp_path):
    kinds = {"code": [{"text": "a"}, {"text": "b"}], "prose": [{"text": "c"}]}
    (tmp_path / "prompts.json").write_text(json.dumps({"evaluation": kinds}))
    assert texts_of(tmp_path, "evaluation", 1) == [["a"], ["c"], ["b"]]
    assert texts_of(tmp_path, "evaluation", 2) == [["a", "c"]]
    assert texts_of(tmp_path, "evaluation", 4) == [["a", "c", "b", "a"]]


def test_what_is_asked():
    row = {"name": HEADS, "batch": 4, "temperature": 0.7, "auto_over_winner": 0.97, "auto_over_plain": 1.16,
           "winner_over_plain": 1.2}  # fmt: skip
    assert [(bar["value"], bar["met"]) for bar in bars_of([row])] == [(0.97, False), (1.16, True), (1.2, True)]
    assert len(bars_of([row | {"batch": 1}])) == 2
