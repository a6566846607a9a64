"""The whole path that made the shipped EAGLE-3 drafter, at a size where only the path is tried."""

import json

import specdec
from scripts import train_tiny_eagle3
from scripts.common import tiny_training
from specdec.drafters.eagle3.loading import load_eagle3


def write_texts(folder, preset, seed):
    """A few functions, without a search through the standard library, which `test_train_tiny_heads` tries."""
    texts = [f"def function_{n}(value):\n    return value + {n}\n" * 4 for n in range(6)]
    for name in ("training", "whole"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_smoke_preset_leaves_a_drafter_and_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_training, "write_texts", write_texts)
    train_tiny_eagle3.main(["--output", str(tmp_path), "--preset", "smoke"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["tokens_per_round"]) == 6 and {len(of) for of in record["tokens_per_round"].values()} == {5}
    assert all(value >= 1 for of in record["tokens_per_round"].values() for value in of.values())
    assert [len(stage) for stage in record["log"]] == [1, 1]
    target = specdec.ModelRunner(specdec.load_tiny_pair().target)
    network, reading = load_eagle3(target, tmp_path)
    assert network.config.draft_vocab_size == 3072 and reading.num_tokens == 5
