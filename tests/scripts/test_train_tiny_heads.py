"""The whole path that made the shipped heads, at a size where only the path is tried: answers, training, calibration, decoding."""

import json

import medusa
from medusa.data import read_rows
from scripts import train_tiny_heads
from specdec.loading import load_model
from specdec.tiny_pair import FOLDER


def test_the_smoke_preset_leaves_heads_a_tree_a_card_and_a_record(tmp_path):
    train_tiny_heads.main(["--output", str(tmp_path), "--preset", "smoke", "--rank", "4"])
    heads, tree = medusa.MedusaHeads.from_pretrained(tmp_path), medusa.load_tree(tmp_path)
    record, found = json.loads((tmp_path / "record.json").read_text()), json.loads((tmp_path / "tree.json").read_text())
    assert heads.config.base_model == "specdec/tiny_pair/target" and heads.config.rank == 4 and 2 <= tree.size <= train_tiny_heads.NODES
    assert len(found["reached"]) == tree.size and found["expected_tokens_per_round"] == sum(found["reached"])
    assert record["tokens_per_round"]["calibrated"]["all"] >= 1
    assert "| head | guesses the token | top-1 | top-5 | top-10 |" in (tmp_path / "README.md").read_text()
    work = tmp_path / "work"
    assert (work / "accuracies.png").stat().st_size > 5000 and (work / "tree.png").stat().st_size > 5000
    answers = [row for path in (work / "answers_training").glob("*.jsonl") for row in read_rows(path)]
    assert len(answers) == 5 and load_model(FOLDER / "target").get_output_embeddings().weight.shape[0] > max(max(row["tokens"]) for row in answers)
