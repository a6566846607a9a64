"""The benchmark of drafters runs from end to end on next to nothing, and its bars are judged as asked."""

import json

import pytest

from scripts import bench_drafters
from scripts.bench_drafters import AUTO, LOOKUP, PLAIN, SELF, SUFFIX, WRONG, bars, main


def test_it_runs_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_drafters, "LENGTHS", (2,))
    monkeypatch.setattr(bench_drafters, "SIZES", (4,))
    main(["--tokens", "6", "--prompts", "1", "--repeats", "1", "--bars", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["speeds"]) == {"code", "prose", "data", "editing"} and len(result["bars"]) == 10
    for methods in result["speeds"].values():
        assert set(methods) == {
            PLAIN,
            "chain 2",
            LOOKUP,
            SUFFIX,
            AUTO,
            WRONG,
            *(SELF.format(bits=bits) for bits in (4, 8)),
        }
        assert methods[PLAIN]["tokens_per_round"] == 1 and all(row["tokens_per_second"] > 0 for row in methods.values())
    (tree,) = result["trees"]
    assert tree["size"] == 4 and tree["ratio"] == pytest.approx(tree["tree"] / tree["chain"])
    assert "NOT MET" in capsys.readouterr().out or all(row["met"] for row in result["bars"])


def test_chains_alone_of_some_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_drafters, "LENGTHS", (2,))
    main(
        [
            "--tokens",
            "4",
            "--prompts",
            "1",
            "--repeats",
            "1",
            "--chains-only",
            "--kinds",
            "code",
            "--json",
            str(tmp_path / "result.json"),
        ]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (
        list(result["speeds"]) == ["code"]
        and set(result["speeds"]["code"]) == {PLAIN, "chain 2"}
        and not result["trees"]
        and not result["bars"]
    )
    with pytest.raises(SystemExit):
        main(["--kinds", "codes"])


@pytest.mark.parametrize(("fast", "met"), [(2.01, True), (1.99, False)])
def test_on_a_gpu_a_chain_is_held_to_twice_plain_decoding(fast, met):
    speed = lambda value: {"tokens_per_second": value, "tokens_per_round": 2.5}
    found = {PLAIN: speed(1.0), "chain 2": speed(1.5), "chain 4": speed(fast)}
    assert [row["met"] for row in bars({"code": found, "prose": found}, [], "cuda")] == [met] and bars(
        {"code": found}, []
    ) == []


@pytest.mark.parametrize(("auto", "wrong", "met"), [(1.95, 0.96, True), (1.93, 0.96, False), (1.95, 0.94, False)])
def test_bars_compare_with_the_best_fixed_chain_and_with_plain(auto, wrong, met):
    speed = lambda value: {"tokens_per_second": value, "tokens_per_round": 2.5}
    found = {
        PLAIN: speed(1.0),
        "chain 2": speed(1.5),
        "chain 4": speed(2.0),
        LOOKUP: speed(9.0),
        AUTO: speed(auto),
        WRONG: speed(wrong),
    }
    judged = bars({"editing": found}, [{"ratio": 1.1}, {"ratio": 1.3}])
    assert all(row["met"] for row in judged) == met and judged[0]["value"] == 1.3 and judged[1]["met"]
