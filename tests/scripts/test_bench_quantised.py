"""The table of what quantisation costs: its figures are what they are called, and a run is cut and taken up again."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import specdec
from scripts import bench_quantised
from scripts.bench_quantised import PRESETS, main
from scripts.common.tiny_models import held_out_loss
from scripts.generate_bench.speeds import NotAvailable
from scripts.quantised_bench.acceptance import DRAFT, LOOKUP, MEDUSA, SELF, drafters_of, measure_acceptance
from scripts.quantised_bench.kinds import QUANTISATIONS, quantised_target
from scripts.quantised_bench.quality import Predictions, held_out_windows, predict
from scripts.quantised_bench.report import report
from scripts.quantised_bench.wide import Streams
from specdec.cli.results import read_result
from tests import quantised_models

BY_NAME = {what.name: what for what in QUANTISATIONS}


@pytest.fixture(scope="module")
def pair():
    return specdec.load_tiny_pair()


@pytest.fixture(scope="module")
def stream(pair):
    text = "\n".join(text for texts in pair.prompts.values() for text in texts)
    return np.asarray(pair.tokenizer(text)["input_ids"], dtype=np.uint16)


def test_loss_and_likeliest_tokens_are_those_of_the_model_itself(pair, stream):
    windows = held_out_windows(stream[: 5 * 24], 5, 24)  # more than one forward
    found = predict(pair.target, windows)
    expected = held_out_loss(pair.target, stream[: 5 * 24 + 1], 24, torch.device("cpu"))
    assert windows.shape == (5, 24) and windows[1].tolist() == stream[24:48].tolist()
    assert found.loss == pytest.approx(expected, abs=1e-5) and 1 < found.loss < 7
    with torch.inference_mode():
        assert found.likeliest.equal(pair.target(windows).logits.argmax(-1))
    pages = predict(pair.target, windows, "int8")
    assert 0 < abs(pages.loss - found.loss) < 0.05 and 0.9 < pages.agreement(found) <= 1
    assert held_out_windows(stream[:100], 2, 24).tolist() == [stream[:24].tolist(), stream[50:74].tolist()]
    with pytest.raises(ValueError, match="100 windows of 999 tokens are wanted"):
        held_out_windows(stream, 100, 999)


def test_agreement_is_a_share_of_positions():
    one = Predictions(1.0, torch.tensor([[1, 2], [3, 4]]))
    assert one.agreement(Predictions(1.0, torch.tensor([[1, 9], [3, 4]]))) == 0.75


def test_acceptance_of_every_drafter_of_the_shipped_target(pair):
    """An exact draft is always accepted, and a drafter that cannot be says why."""
    drafters = drafters_of(pair.target, pair.target, True, 32)
    assert list(drafters) == [DRAFT, MEDUSA, LOOKUP, SELF]

    def fails():
        raise ValueError("no layer\nis left")

    texts = [pair.prompts["code"][0], pair.prompts["editing"][0]]
    found = measure_acceptance(pair.target, drafters | {"none": fails}, texts, pair.tokenizer, 12, None)
    assert found.pop("none") == {"error": "no layer is left"}
    assert found[DRAFT]["acceptance_rate"] == 1 and found[DRAFT]["tokens_per_round"] == 6
    assert all(one["equal_texts"] == 2 and 1 <= one["tokens_per_round"] <= 6 for one in found.values())
    assert 0 < found[MEDUSA]["acceptance_rate"] < found[SELF]["acceptance_rate"] <= 1


def test_layers_that_stay_are_counted(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    checkpoint = bench_quantised.subjects_of(["tiny"], PRESETS["smoke"], tmp_path)[0].checkpoint
    made = {name: quantised_target(checkpoint, BY_NAME[name], tmp_path, 32) for name in ("float32", "int4-small")}
    assert (made["float32"][1].quantised, made["float32"][1].kept) == (0, [])
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in range(20)]  # 432 inner positions
    layers = made["int4-small"][1]
    assert (layers.quantised, layers.group, layers.kept) == (120, 32, [*down, "lm_head"])
    changed = [
        name for name, layer in made["int4-small"][0].named_modules()
        if isinstance(layer, torch.nn.Linear) and type(layer.weight) is not torch.nn.Parameter
    ]  # fmt: skip
    assert len(changed) == 120 and not set(changed) & set(layers.kept)


def test_a_calibrated_checkpoint_is_taken_from_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors", reason="compressed_tensors is not installed")
    plain, gptq = quantised_models._folder(None), BY_NAME["gptq"]
    found = importlib_without("llmcompressor")
    monkeypatch.setattr("importlib.util.find_spec", found)
    with pytest.raises(NotAvailable, match="llm-compressor is not installed; .*--method gptq --group 32"):
        quantised_target(plain, gptq, tmp_path, 32)
    (tmp_path / "gptq").symlink_to(quantised_models._folder("compressed int4"))
    model, layers = quantised_target(plain, gptq, tmp_path, 32)
    assert (layers.quantised, layers.kept, layers.group) == (14, ["lm_head"], 32)
    tokens = torch.arange(3, 12)[None]
    expected = quantised_models.model_of("compressed int4")(tokens).logits
    assert model(tokens).logits.equal(expected) and not model(tokens).logits.equal(
        specdec.load_model(plain)(tokens).logits
    )


def importlib_without(package):
    import importlib.util

    find = importlib.util.find_spec
    return lambda name, *rest: None if name == package else find(name, *rest)


def test_a_run_is_cut_and_taken_up_again(tmp_path, capsys, monkeypatch, stream):
    pytest.importorskip("torchao", reason="torchao is not installed")
    monkeypatch.setattr("scripts.quantised_bench.subjects.read_streams", lambda *_: Streams(stream, stream))
    monkeypatch.setattr("importlib.util.find_spec", importlib_without("llmcompressor"))
    names = ["float32", "int4", "gptq", "kv-int8"]
    arguments = ["--preset", "smoke", "--models", "wide", "--folder", str(tmp_path / "runs"), "--quantisations"]
    file = tmp_path / "result.json"
    main([*arguments, "float32", "int4", "--json", str(file)])
    result = json.loads(file.read_text())
    assert "figures:" in capsys.readouterr().out and result["complete"]
    plain, int4 = result["methods"]
    assert (plain["loss_added"], plain["agreement"], plain["positions"]) == (0, 1, 48)
    assert int4["layers"] == {"quantised": 14, "kept": ["lm_head"], "group": 128}
    assert 0 < abs(int4["loss_added"]) < 0.5 and int4["agreement"] < 1
    assert set(plain["drafters"]) == {DRAFT, LOOKUP, SELF} and "error" in int4["drafters"][SELF]

    main([*arguments, *names, "--seconds", "0"])
    printed = capsys.readouterr().out
    again = json.loads(printed.splitlines()[-1])
    assert again["methods"] == result["methods"] and again["skipped"] == ["wide-gptq", "wide-kv-int8"]
    assert "in an earlier run" in printed and not again["complete"]
    main([*arguments, "float32", "gptq"])
    printed = capsys.readouterr().out
    assert "missing: wide, weights int4 by GPTQ: llm-compressor is not installed" in printed
    monkeypatch.setitem(PRESETS, "smoke", replace(PRESETS["smoke"], tokens=7))
    with pytest.raises(ValueError, match="other settings"):
        main([*arguments, "float32"])


def test_the_report_has_a_line_for_everything(tmp_path):
    accepted = {"acceptance_rate": 0.5, "tokens_per_round": 3.25, "equal_texts": 1, "texts": 2}
    row = {
        "model": "tiny", "quantisation": "int8", "title": "weights int8", "loss": 2.0, "loss_added": 0.125,
        "agreement": 0.9, "positions": 48, "window": 24, "layers": {"quantised": 2, "kept": ["a.0.b", "a.1.b"]},
        "drafters": {DRAFT: accepted, SELF: {"error": "no layer"}},
    }  # fmt: skip
    other = row | {"title": "weights fp8", "drafters": {DRAFT: {"acceptance_rate": None}}}
    missing = [{"model": "wide", "title": "AWQ", "why": "not there"}]
    said = report({"methods": [row, other], "missing": missing, "skipped": ["wide-int8"]}).splitlines()
    assert said[3].split() == ["weights", "int8", "2", "2", "2.0000", "+0.1250", "90.00%", "0.500", "(3.25)", "-"]
    assert said[4].split()[-2:] == ["-", "-"]
    assert "weights int8, draft model: 1 of 2 texts are plain decoding's to the last token" in said
    assert "  weights int8: a.*.b (2)" in said and "no quantised self: no layer (weights int8)" in said
    assert said[-2:] == ["missing: wide, AWQ: not there", "not measured for want of time: wide-int8"]


def test_the_kept_result_has_every_line():
    """All quantisations of both targets, measured or named with a reason; loss and agreement are in keeping."""
    result = read_result("scripts/results/quantised_cpu.json")
    rows = {(row["model"], row["title"]): row for row in [*result["methods"], *result["missing"]]}
    assert set(rows) == {(model, what.title) for model in ("tiny", "wide") for what in QUANTISATIONS}
    assert [(row["model"], row["title"]) for row in result["missing"]] == [("tiny", BY_NAME["smoothquant"].title)]
    assert result["skipped"] == [] and result["settings"] == asdict(PRESETS["full"])
    for row in result["methods"]:
        assert set(row["drafters"]) - {MEDUSA} == {DRAFT, LOOKUP, SELF}
        assert (MEDUSA in row["drafters"]) == (row["model"] == "tiny")
        own = next(one for one in result["methods"] if one["model"] == row["model"])
        assert row["loss_added"] == pytest.approx(row["loss"] - own["loss"]) and 0.9 < row["agreement"] <= 1
        if row["quantisation"] not in ("bfloat16", "int8-dynamic", "smoothquant"):  # where near-ties may part texts
            assert all(one.get("equal_texts", 32) == 32 for one in row["drafters"].values())
