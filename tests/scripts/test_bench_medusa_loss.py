"""The benchmark of the heads' loss runs from end to end on next to nothing, and its arithmetic is that of the matrices
multiplied.
"""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts import bench_medusa_loss
from scripts.bench_medusa_loss import BACKBONE, EACH, PLAIN, WHOLE, bound, build_heads, build_model, main, ways
from specdec.training.backbone import Backbone

TINY = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--vocab",
    "50",
    "--hidden",
    "16",
    "--heads",
    "2",
    "--layers",
    "1",
    "--sequence",
    "24",
    "--repeats",
    "1",
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run():
        monkeypatch.setattr(bench_medusa_loss, "SHARES", (1.0, 0.5))
        main([*TINY, "--bars", "--json", str(tmp_path / "result.json")])
        return json.loads((tmp_path / "result.json").read_text()), capsys.readouterr().out

    return run


def test_it_runs_and_writes_what_it_measured(run):
    result, printed = run()
    assert (
        result["schema"] == 1
        and result["settings"]["vocab"] == 50
        and "torch" in result["environment"]
        and "Synthetic" in result["note"]
    )
    assert [(row["output"], row["label_share"], row["what"]) for row in result["rows"]] == [
        (output, share, what)
        for output in ("own", "shared", "low_rank")
        for share in (1.0, 0.5)
        for what in (BACKBONE, PLAIN, EACH, WHOLE)
    ]
    for row in result["rows"]:
        assert (
            row["status"] == "ok"
            and row["range"][0] <= row["milliseconds"] <= row["range"][1]
            and row["loss_bytes"] is row["peak_bytes"] is None
        )
        if row["what"] in (EACH, WHOLE):
            assert row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-5
    assert len(result["bars"]) == 3 * (4 + 2) and all(
        (bar["met"] is None) == ("memory" in bar["what"]) for bar in result["bars"]
    )
    assert "not measured" in printed and "no memory figures on a CPU" in printed


def test_a_plain_loss_without_room_is_recorded_and_the_rest_goes_on(run, monkeypatch):
    def plain_loss(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench_medusa_loss, "plain_loss", plain_loss)
    result, printed = run()
    assert {(row["what"] == PLAIN, row["status"]) for row in result["rows"]} == {(True, "out of memory"), (False, "ok")}
    assert (
        all((bar["met"] is None) == bar["what"].startswith("plain") for bar in result["bars"])
        and "out of memory" in printed
    )


@pytest.mark.parametrize("output", ["own", "shared", "low_rank"])
def test_the_bound_counts_the_operations_that_are_done(output):
    model = build_model(50, 16, 2, 24, torch.device("cpu"), torch.float32)
    heads, backbone, tokens = build_heads(model, 2, output), Backbone(model), torch.randint(50, (1, 24))
    with FlopCounterMode(
        display=False
    ) as above:  # of the plain loss, which takes every position through every head; the counter stops at ours
        ways(heads, torch.randn(1, 24, 16), tokens, model.lm_head)[PLAIN]()
    with torch.no_grad(), FlopCounterMode(display=False) as below:
        backbone(tokens)
    products = sum(
        count for operation, count in below.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )
    attention = 2 * (4 * 24 * 24 * 16) / 2  # of two layers, the causal half
    assert bound(model, heads, 2 * 24, 1, 24) == pytest.approx(above.get_total_flops() / (products + attention))
