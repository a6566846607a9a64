"""The benchmark of few-row products: its path on a CPU, and how its rows become sums and bars."""

import json

import pytest

from scripts import bench_products
from scripts.bench_products import LAYERS, OURS, TORCHAO, add_layers, bars_of


def test_every_kind_runs_and_is_as_exact_as_its_numbers(tmp_path, capsys):
    path = tmp_path / "result.json"
    bench_products.main(["--shape", "toy", "--rows", "1", "3", "--device", "cpu", "--json", str(path), "--bars"])
    result = json.loads(path.read_text())
    ours = [row for row in result["methods"] if row["name"] == OURS and row["product"] != LAYERS]
    ran = [row for row in ours if row["error"] is None]
    assert {row["kind"] for row in ran} >= {"16 bits", "int8", "fp8"} and len(ran) > 12
    assert all(row["apart"] < 1e-2 and row["repeats"] and row["seconds"] > 0 for row in ran)
    assert all("do not divide" in row["error"] or "groups" in row["error"] for row in ours if row["error"] is not None)
    assert "product" in capsys.readouterr().out


def row(product, name, seconds, **other):
    about = {"product": product, "kind": "int4", "name": name, "rows": 8, "bytes": 10, "spread": 0.0, "error": None}
    return about | {"seconds": seconds, "apart": 1e-3, "repeats": True} | other


def test_sums_and_bars_are_of_all_layers():
    rows = [row("o", OURS, 1.0), row("down", OURS, 2.0, apart=2e-3), row("output", OURS, 50.0)]
    rows += [row("o", TORCHAO, 3.0), row("down", TORCHAO, 3.0)]
    sums = add_layers(rows, 2)
    assert [(one["name"], one["seconds"], one["bytes"], one["apart"]) for one in sums] == [
        (OURS, 6.0, 40, 2e-3),
        (TORCHAO, 12.0, 40, 1e-3),
    ]
    speed, error = bars_of(sums, True)
    assert (
        speed["value"] == 2.0 and speed["at_least"] == 1.5 and speed["met"] and error["value"] == 2e-3 and error["met"]
    )
    rows[3]["error"] = "ImportError: no torchao"  # one product that did not run leaves no sum
    assert [one["name"] for one in add_layers(rows, 2)] == [OURS]
    assert bars_of(add_layers(rows, 2), True)[0]["met"] is None
    assert bars_of([row(LAYERS, OURS, 1.0, repeats=False)], True)[1]["met"] is False


def test_counts_below_one_are_refused():
    with pytest.raises(SystemExit):
        bench_products.main(["--shape", "toy", "--rows", "0"])
