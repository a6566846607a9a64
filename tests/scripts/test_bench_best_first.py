"""The path of the benchmark of best-first trees, at a toy size: its times mean nothing."""

import json

import pytest

from scripts.bench_best_first import main, options_of


def test_a_toy_run_has_a_row_for_each_tree(tmp_path, capsys):
    path = tmp_path / "trees.json"
    main(["--device", "cpu", "--dtype", "float32", "--vocabulary", "300", "--batch", "1", "2", "--nodes", "4", "16",
          "--slots", "3", "--rank", "4", "--json", str(path)])  # fmt: skip
    rows = json.loads(path.read_text())["records"]
    assert len({(row["batch"], row["kind"], row["growth"], row["nodes"]) for row in rows}) == len(rows) == 16
    assert all(row["us"] > 0 and row["share"] > 0 and row["found"] == row["nodes"] for row in rows)
    assert "synthetic" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--nodes", "0"], ["--step-ms", "0"], ["--rank", "-1"]])
def test_sizes_that_cannot_be_run_are_refused(wrong):
    with pytest.raises(SystemExit):
        options_of(wrong)
