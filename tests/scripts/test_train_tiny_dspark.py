"""The whole path that made the shipped DSpark drafter, at a size where only the path is tried."""

import json

import specdec
from scripts import train_tiny_dspark
from scripts.common import tiny_training
from specdec.drafters.block.loading import load_block
from tests.scripts.test_train_tiny_eagle3 import write_texts


def test_the_smoke_preset_leaves_a_drafter_and_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_training, "write_texts", write_texts)
    train_tiny_dspark.main(["--output", str(tmp_path), "--preset", "smoke"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert {name.split(",")[0] for name in record["tokens_per_round"]} == {"DSpark", "EAGLE-3"}
    assert all(value >= 1 for of in record["tokens_per_round"].values() for value in of.values())
    assert [len(stage) for stage in record["log"]] == [1, 1] and record["settings"]["anchors"] == 8
    assert (tmp_path / "model.safetensors").stat().st_size < 3e6
    network, _ = load_block(specdec.ModelRunner(specdec.load_tiny_pair().target), tmp_path)
    assert network.config.num_slots == 6 and network.config.draft_vocab_size == 4096
