"""The experiment with learned drafters runs from end to end on next to nothing, goes on where it was cut, and trains a
drafter for as long as the heads."""

import json

import pytest
import torch

from scripts import bench_learned
from scripts.bench_learned import MEDUSA, bars_of, chain, grown, main, marginals, prompts_of
from scripts.bench_medusa import OURS
from scripts.common.side_by_side import ALL
from scripts.learned_bench import training
from scripts.learned_bench.presets import PRESETS
from scripts.learned_bench.training import heads_seconds, step_seconds, steps_for
from scripts.medusa_bench import models
from specdec.cli.results import read_result
from tests.scripts.test_bench_medusa import arguments, sources  # noqa: F401

torch.set_num_threads(1)


def test_it_is_cut_goes_on_and_writes_what_it_measured(sources, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(bench_learned.PRESETS, "smoke", PRESETS["smoke"] | {"chains": [2], "prompts": 1})
    file, folder = tmp_path / "result.json", tmp_path / "runs"
    options = [*arguments(sources, folder), "--json", str(file), "--bars"]
    with pytest.raises(SystemExit, match="corpus was not begun within --seconds 0"):
        main([*options, "--seconds", "0"])
    assert not (folder / "corpus.json").exists()
    main(options)
    result = read_result(file)
    name = "EAGLE-3"
    trained, budget = result["trained"][name], result["heads_seconds"]
    assert budget == heads_seconds(result["settings"], result["stages"]["heads"]["log"]) > 0
    assert trained["training"]["steps"] == steps_for(budget, trained["timing"]) and len(trained["timing"]["each"]) == 3
    assert trained["seconds_over_heads"] == trained["training"]["training_seconds"] / budget
    drafted = {chain(name, 2), grown(name, result["settings"])}
    drafted |= {f"{name} static tree of 8, {what}" for what in ("most likely", "drawn")}
    drafted |= {chain("DSpark", 2), marginals("DSpark", 2), "DSpark best-first tree of 8"}
    assert result["trained"]["DSpark"]["tree"] is None and result["trained"]["DSpark"]["training"]["steps"] > 0
    assert {row["method"] for row in result["methods"]} == {OURS, MEDUSA} | drafted and result["complete"]
    assert {(row["temperature"], row["batch"]) for row in result["methods"]} == {(0.0, 1), (0.7, 1)}
    assert all(row["calls"] == 1 for row in result["methods"] if row["kind"] == ALL)
    assert all(pair["identical"] == pair["texts"] == 1 for pair in result["differences"])
    assert len(result["bars"]) >= 7 and "EAGLE-3 chain of 2 over Medusa" in capsys.readouterr().out
    assert result["stages"]["target"]["held_out_loss"] > 0

    for module, what in ((models, "train_medusa"), (training, "_train"), (training, "decode_prompts")):
        monkeypatch.setattr(module, what, None)  # nothing that is done is done again
    main([*options, "--seconds", "0"])
    assert read_result(file)["methods"] == result["methods"]
    monkeypatch.setitem(bench_learned.PRESETS, "smoke", PRESETS["smoke"] | {"chains": [3]})
    with pytest.raises(ValueError, match="other settings"):
        main(options)


def test_the_seconds_of_training_leave_out_the_first_step():
    log = [{"step": step, "tokens_per_second": speed} for step, speed in ((0, 1.0), (2, 50.0), (5, 100.0))]
    assert step_seconds(log, 100) == pytest.approx((2 * 2.0 + 3 * 1.0) / 5) and step_seconds(log[:1], 100) == 100
    assert heads_seconds({"heads_steps": 6, "heads_batch": 2, "context": 50}, log) == pytest.approx(6 * 7 / 5)
    assert steps_for(10.0, {"step_seconds": 0.4}) == 25 and steps_for(0.1, {"step_seconds": 0.4}) == 1


def test_prompts_are_of_all_kinds_in_turn(tmp_path):
    kinds = {"code": [{"text": text} for text in "abc"], "prose": [{"text": "d"}]}
    (tmp_path / "prompts.json").write_text(json.dumps({"evaluation": kinds}))
    assert prompts_of(tmp_path, "evaluation", 3) == {"code": ["a", "b"], "prose": ["d"]}
    assert prompts_of(tmp_path, "evaluation") == {"code": ["a", "b", "c"], "prose": ["d"]}


def row_of(method, length, speed, kind=ALL, temperature=0.0):
    return {"method": method, "kind": kind, "temperature": temperature, "tokens_per_round": length,
            "over_ours": {"pooled": speed}}  # fmt: skip


def test_what_is_asked_of_dspark_is_judged_beside_eagle3():
    own, ours, theirs = PRESETS["full"], chain("DSpark", 7), chain("EAGLE-3", 7)
    rows = [row_of(MEDUSA, 2.5, 1.7), row_of(ours, 3.0, 2.0), row_of(theirs, 3.2, 9.0)]
    rows += [row_of(grown("EAGLE-3", own), 3.4, 1.8), row_of("DSpark best-first tree of 64", 3.6, 2.4)]
    rows += [row_of(ours, 2.6, 1.0, temperature=0.7), row_of(marginals("DSpark", 7), 2.0, 1.0, temperature=0.7)]
    rows += [row_of(ours, 4.0, 2.6, kind="code"), row_of("DSpark best-first tree of 64", 5.0, 2.3, kind="code")]
    judged = bars_of(rows, ["EAGLE-3", "DSpark"], own)[4:]
    assert [(bar["value"], bar["at_least"], bar["met"]) for bar in judged] == [
        (pytest.approx(3.0 / 3.2), 1.0, False), (pytest.approx(1.2), 1.15, True), (pytest.approx(1.3), 1.3, True),
        (2.6, 2.5, True),
    ]  # fmt: skip
    assert ours in judged[-1]["what"] and len(bars_of(rows, ["DSpark"], own)) == 4


def test_what_is_asked_is_judged_on_greedy_texts_of_all_kinds():
    own = PRESETS["full"]
    rows = [row_of(MEDUSA, 2.5, 1.7), row_of(chain("EAGLE-3", 5), 2.9, 2.1), row_of(chain("EAGLE-3", 7), 3.0, 1.9)]
    rows += [row_of(grown("EAGLE-3", own), 3.4, 1.8), row_of(chain("EAGLE-3", 7), 9.0, 9.0, temperature=0.7)]
    rows += [row_of(chain("EAGLE-3", 7), 9.0, 9.0, kind="code")]
    judged = bars_of(rows, ["EAGLE-3"], own)
    assert [(bar["value"], bar["met"]) for bar in judged] == [
        (2.5, False), (pytest.approx(1.2), True), (pytest.approx(1.36), False), (2.1, True),
    ]  # fmt: skip
    assert "(EAGLE-3 chain of 5)" in judged[-1]["what"]
