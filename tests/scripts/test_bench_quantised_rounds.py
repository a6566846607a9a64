"""The benchmark of rounds with quantised weights: its path on a CPU, and how its rows become bars."""

import json

import pytest

from scripts import bench_quantised_rounds
from scripts.bench_quantised_rounds import AUTO, NODES, OUTPUT, PLAIN, SELF, SIXTEEN, bars_of

pytest.importorskip("torchao")
SMALL = ["--shape", "toy", "--device", "cpu", "--prompt", "8", "--new-tokens", "6", "--repeats", "1", "--warm", "1",
         "--lengths", "2", "--group", "32"]  # fmt: skip


def test_every_method_of_every_kind_gives_the_text_of_plain_decoding(tmp_path, capsys):
    path = tmp_path / "result.json"
    bench_quantised_rounds.main([*SMALL, "--kinds", SIXTEEN, "int8", OUTPUT, "--json", str(path), "--bars"])
    rows = json.loads(path.read_text())["methods"]
    assert all(row["error"] is None for row in rows)
    ran = {(row["kind"], row["method"]): row for row in rows if row["method"] != "forwards"}
    expected = {(kind, name) for kind in (SIXTEEN, "int8", OUTPUT) for name in (PLAIN, "chain 2", AUTO)}
    assert set(ran) == expected | {(SIXTEEN, SELF)}
    assert all(row["same_text_as_plain"] and row["tokens_per_second"] > 0 for row in ran.values())
    assert ran[SIXTEEN, PLAIN]["over_plain"] == 1 and ran["int8", "chain 2"]["acceptance_rate"] == 1
    assert "tokens/round" in capsys.readouterr().out


def row(kind, method, speed, **other):
    return {
        "kind": kind,
        "method": method,
        "tokens_per_second": speed,
        "over_plain": speed / 100,
        "error": None,
    } | other


def test_bars_compare_with_the_16_bit_target_of_the_same_run():
    seconds = {"1": 1.0, "6": 1.04, "16": 1.3, f"tree {NODES}": 2.0}
    rows = [
        row(SIXTEEN, PLAIN, 100.0),
        row("int4", PLAIN, 210.0),
        row("int4", "chain 5", 700.0),
        row("int4", AUTO, 690.0),
    ]
    rows += [
        {"kind": kind, "method": "forwards", "forward_seconds": seconds, "error": None} for kind in (SIXTEEN, "int4")
    ]
    found = {bar["what"]: (bar["value"], bar["met"]) for bar in bars_of(rows, True)}
    assert found == {
        "int4, plain over 16-bit plain": (2.1, True), "int4, 6 tokens over 1": (1.04, True),
        "int4, 16 tokens over 1": (1.3, False), f"int4, a tree {NODES} over the 16-bit target's": (1.0, False),
        "int4, auto over the best fixed length": (690 / 700, True),
    }  # fmt: skip
    assert all(bar["met"] is None for bar in bars_of(rows, False))


def test_counts_below_one_are_refused():
    with pytest.raises(SystemExit):
        bench_quantised_rounds.main([*SMALL, "--repeats", "0"])
