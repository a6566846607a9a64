"""The path of the benchmark of sampled rounds, at a toy size: its times mean nothing."""

import json

import pytest

from scripts.bench_sampling import KINDS, SETTINGS, main, options_of


def test_a_toy_run_has_a_row_for_each_round_and_setting(tmp_path, capsys):
    path = tmp_path / "sampling.json"
    main(["--shape", "toy", "--device", "cpu", "--dtype", "float32", "--batch", "2", "--prompt", "16", "--repeats", "2",
          "--json", str(path)])  # fmt: skip
    rows = json.loads(path.read_text())["records"]
    assert [(row["method"], row["setting"]) for row in rows] == [(kind, name) for kind in KINDS for name in SETTINGS]
    assert all(row["ms"] > 0 and (row["over_greedy"] == 1) == (row["setting"] == "greedy") for row in rows)
    assert "synthetic control" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--repeats", "0"], ["--prompt", "4"]])
def test_sizes_that_cannot_be_run_are_refused(wrong):
    with pytest.raises(SystemExit):
        options_of(wrong)
