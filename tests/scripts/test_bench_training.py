"""The benchmark of EAGLE-3's training runs from end to end on next to nothing, and counts what is multiplied."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts import bench_training
from scripts.bench_medusa_loss import build_model
from scripts.bench_training import bars_of, bound, forward_seconds, held_bytes, main, options_of, random_rows
from specdec.cli.results import read_result
from specdec.training.backbone import Backbone
from specdec.training.eagle3.network import new_eagle3


@pytest.fixture(scope="module")
def pair():
    model = build_model(50, 16, 2, 24, torch.device("cpu"), torch.float32)
    return model, new_eagle3(model, torch.arange(20))


def test_it_runs_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "result.json"
    monkeypatch.setattr(bench_training, "AT_LEAST", {1: 0.0, 2: 1e9})
    main(["--preset", "toy", "--device", "cpu", "--bars", "--json", str(file)])
    result, printed = read_result(file), capsys.readouterr().out
    rows = result["methods"]
    assert [(row["rows"], row["length"], row["depth"], row["rows_at_once"]) for row in rows] == [
        (4, 16, 1, 2), (4, 16, 2, 2), (1, 64, 1, 1), (1, 64, 2, 1),
    ]  # fmt: skip
    for row in rows:
        assert row["step_range"][0] <= row["step_seconds"] <= row["step_range"][1] and len(row["losses"]) == 3
        assert row["over_forward"] == row["forward_seconds"] / row["step_seconds"] and row["peak_bytes"] is None
        assert 0 < row["bound"] < 1 and row["tokens_per_second"] == 64 / row["step_seconds"]
    assert [bar["met"] for bar in result["bars"]] == [True, None, False, None] and "NOT MET" in printed
    main(["--preset", "toy", "--device", "cpu", "--profile"])
    assert "aten::mm" in capsys.readouterr().out


def test_rows_that_do_not_make_a_step_are_refused():
    with pytest.raises(ValueError, match=r"rows of \[24\] do not make 64 tokens"):
        options_of(["--preset", "toy", "--lengths", "24", "32"])


def test_the_forward_alone_is_that_of_the_rows_a_part_at_a_time(pair, monkeypatch):
    model, network = pair
    backbone, rows, seen = Backbone(model), random_rows(5, 24, 50), []
    features = Backbone.features
    monkeypatch.setattr(Backbone, "features", lambda self, *given: seen.append(given) or features(self, *given))
    assert len(forward_seconds(backbone, network, rows, 2, 3)) == 3 and len(seen) == 4 * 3
    assert torch.cat([tokens for tokens, _ in seen[:3]]).equal(rows.tokens.long())


def test_the_bound_counts_the_matrices_and_what_is_held(pair):
    model, network = pair
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.base_model(torch.randint(50, (1, 24)))
    products = counter.get_flop_counts()["Global"]
    alone = sum(n for operation, n in products.items() if "attention" not in str(operation)) / 24 + 2 * 2 * 24 * 16
    learned = {name: p.numel() for name, p in network.named_parameters() if p.ndim == 2}
    fusion, head = learned.pop("fc.weight"), learned.pop("lm_head.weight")
    drafted = 6 * (sum(learned.values()) + head) + 4.5 * 2 * 24 * 16
    assert bound(model, network, 24, 3) == pytest.approx(alone / (alone + 4 * fusion + 2 * head + 3 * drafted))
    weights = sum(p.numel() for p in model.parameters())
    assert held_bytes(model, network) == 4 * (weights + 3 * sum(p.numel() for p in network.parameters()))


def test_requirements_are_judged_on_the_first_length():
    of = lambda length, depth, speed, memory: {"length": length, "depth": depth, "over_forward": speed,
                                               "peak_over_held": memory}  # fmt: skip
    rows = [of(2048, 3, 0.6, 1.2), of(2048, 7, 0.3, 1.4), of(8192, 3, 0.1, 9.0)]
    assert [bar["met"] for bar in bars_of(rows, 2048)] == [True, True, False, False]
    assert SimpleNamespace(**bars_of(rows, 8192)[1]).value == 9.0
