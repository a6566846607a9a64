"""The comparison of tree="auto" with fixed shapes runs from end to end on next to nothing, and resumes."""

import json
from types import SimpleNamespace

import pytest
import torch

from scripts import bench_auto_tree
from scripts.bench_auto_tree import AUTO, DRAFT, HEADS, PLAIN, Runs, bars_of, believed, main, sweep_of, texts_of
from specdec.cli.results import read_result
from specdec.planning.fit import Fit
from tests.scripts.test_bench_medusa import arguments, sources  # noqa: F401
from tests.specdec.planning.card import CASES, Card

torch.set_num_threads(1)


def test_it_sweeps_measures_beside_and_resumes(sources, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(bench_auto_tree, "LENGTHS", {HEADS: (1, 2), DRAFT: (1, 3)})
    monkeypatch.setattr(bench_auto_tree, "SIZES", (4, 8))
    monkeypatch.setattr(bench_auto_tree, "MOST_WARM", 2)
    file, folder = tmp_path / "result.json", tmp_path / "runs"
    options = [*arguments(sources, folder), "--passes", "1", "--beside", "2", "--temperatures", "0.7"]
    options += ["--sweep-seconds", "0", "--beside-seconds", "0"]
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
        assert row["believed"] == [] and row["captured_beside"] >= 0, "captured on a GPU only"
    for record in result["records"]:
        calls = zip(record["rounds"], record["new_tokens"], strict=True)
        assert all(rounds >= tokens / 2 / 9 for rounds, tokens in calls) and sum(record["shapes"].values()) > 0
    assert len(result["bars"]) == 4 and "auto/best" in capsys.readouterr().out.splitlines()[-4]
    monkeypatch.setattr(bench_auto_tree, "measure", None)  # nothing that is done is done again
    main([*options, "--batches", "2", "--json", str(file)])
    assert read_result(file)["methods"] == result["methods"]


class Recorded(Runs):
    """Runs without a model, that take a second a pass on a clock of their own."""

    def __init__(self, clock, **seconds):
        self.records, self._clock, self._seconds, self.ran = [], clock, seconds, []

    def one_pass(self, name, generator, repeat):
        self.ran.append((name, repeat))
        for texts, seconds in enumerate(self._seconds[name]):
            self._clock[0] += seconds
            if repeat is not None:
                record = {"method": name, "texts": texts, "repeat": repeat, "new_tokens": 10, "seconds": seconds}
                self.records.append(record)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_auto_tree.time, "perf_counter", lambda: now[0])
    return now


def test_passes_go_on_for_a_time_back_and_forth(clock):
    runs = Recorded(clock, a=[1.0], b=[2.0])
    runs.side_by_side({"a": None, "b": None}, 2, 0)
    assert runs.ran == [("b", 0), ("a", 0), ("a", 1), ("b", 1)]
    runs.side_by_side({"a": None, "b": None}, 0, 4.0)
    assert runs.passes("a") == [0, 1, 2, 3, 4] == runs.passes("b"), "three of three seconds, for four seconds each"


def test_a_speed_is_that_of_the_median_second_for_a_token_of_each_batch_of_texts():
    runs = Recorded([0.0])
    for texts, repeat, tokens, seconds in ((0, 0, 10, 1.0), (0, 1, 20, 3.0), (0, 2, 30, 30.0), (1, 0, 100, 5.0)):
        runs.records.append({"method": "m", "texts": texts, "repeat": repeat, "new_tokens": tokens, "seconds": seconds})
    assert runs.speed("m") == pytest.approx(1 / ((0.15 + 0.05) / 2))
    assert runs.speed("m", 0) == pytest.approx(1 / ((0.1 + 0.05) / 2)) and runs.speed("m", 2) == pytest.approx(1.0)


def test_shapes_near_the_best_run_for_longer(clock):
    runs = Recorded(clock, **{"d, chain 1": [1.0], "d, chain 2": [1.05], "d, chain 3": [1.5]})
    own = SimpleNamespace(passes=2, sweep_seconds=10.0)
    found = sweep_of(runs, dict.fromkeys(("d, chain 1", "d, chain 2", "d, chain 3")), own)
    assert found == {"chain 1": 10.0, "chain 2": pytest.approx(10 / 1.05), "chain 3": pytest.approx(10 / 1.5)}
    count = lambda name: len(runs.passes(f"d, {name}"))
    assert count("chain 1") == count("chain 2") == 2 + 10 and count("chain 3") == 2
    assert runs.ran[:3] == [(name, None) for name in ("d, chain 1", "d, chain 2", "d, chain 3")]


def test_what_auto_believes_is_recorded():
    card = Card(**CASES["heads"], rows=4)
    card.batch()
    generator = SimpleNamespace(
        target=SimpleNamespace(slots_for=lambda count: 4), _automatic=SimpleNamespace(_fits={"kind": card.fit})
    )
    (found,) = believed(generator, 3)
    assert found["shapes"].keys() == card.fit.times[4].known.keys() and found["last"] == card.fit.last[4].name
    assert found["idle"] == card.fit.idle[4].per_token and json.dumps(found)
    generator._automatic._fits = {"kind": Fit()}
    assert believed(generator, 3) == [{"shapes": {}, "last": None, "idle": 0.0}]


def test_texts_are_of_all_kinds_in_turn(tmp_path):
    kinds = {"code": [{"text": "a"}, {"text": "b"}], "prose": [{"text": "c"}]}
    (tmp_path / "prompts.json").write_text(json.dumps({"evaluation": kinds}))
    assert texts_of(tmp_path, "evaluation", 1) == [["a"], ["c"], ["b"]]
    assert texts_of(tmp_path, "evaluation", 2) == [["a", "c"], ["b", "a"]]
    assert texts_of(tmp_path, "evaluation", 4) == [["a", "c", "b", "a"], ["c", "b", "a", "c"]]


def test_what_is_asked():
    row = {"name": HEADS, "batch": 4, "temperature": 0.7, "auto_over_winner": 0.97, "auto_over_plain": 1.16,
           "winner_over_plain": 1.2}  # fmt: skip
    assert [(bar["value"], bar["met"]) for bar in bars_of([row])] == [(0.97, False), (1.16, True), (1.2, True)]
    assert len(bars_of([row | {"batch": 1}])) == 2
