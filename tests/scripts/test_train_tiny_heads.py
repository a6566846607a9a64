"""The whole path that made the shipped heads, at a size where only the path is tried: answers, training, calibration,
decoding.
"""

import json
from types import SimpleNamespace

import medusa
from scripts import train_tiny_heads
from specdec.loading import load_model
from specdec.report.stats import RoundStats
from specdec.tiny_pair import FOLDER
from specdec.training.files import read_rows
from specdec.trees.tree import TokenTree


def test_the_smoke_preset_leaves_heads_a_tree_a_card_and_a_record(tmp_path):
    train_tiny_heads.main(["--output", str(tmp_path), "--preset", "smoke", "--rank", "4"])
    heads, tree = medusa.MedusaHeads.from_pretrained(tmp_path), medusa.load_tree(tmp_path)
    record, found = json.loads((tmp_path / "record.json").read_text()), json.loads((tmp_path / "tree.json").read_text())
    assert (
        heads.config.base_model == "specdec/tiny_pair/target"
        and heads.config.rank == 4
        and 2 <= tree.size <= train_tiny_heads.NODES
    )
    assert len(found["reached"]) == tree.size and found["expected_tokens_per_round"] == sum(found["reached"])
    assert record["tokens_per_round"]["calibrated"]["all"] >= 1
    assert "| head | guesses the token | top-1 | top-5 | top-10 |" in (tmp_path / "README.md").read_text()
    work = tmp_path / "work"
    assert (work / "whole/accuracies.png").stat().st_size > 5000 and (work / "whole/tree.png").stat().st_size > 5000
    answers = [row for path in (work / "answers_training").glob("*.jsonl") for row in read_rows(path)]
    assert len(answers) == 5 and load_model(FOLDER / "target").get_output_embeddings().weight.shape[0] > max(
        max(row["tokens"]) for row in answers
    )


def test_no_prompt_is_decoded_with_a_tree_that_its_own_answer_gave(monkeypatch):
    answers = [{"tokens": [*range(length), 7, 8, 9], "learned_from": length} for length in (9, 8, 8, 5, 4)]
    calibrated, seen = [], []
    monkeypatch.setattr(train_tiny_heads, "build_rows", lambda rows, *_, **__: rows)
    monkeypatch.setattr(
        medusa,
        "head_ranks",
        lambda heads, model, rows: calibrated.append([row["tokens"][: row["learned_from"]] for row in rows]),
    )
    monkeypatch.setattr(medusa, "calibrated_tree", lambda *_: TokenTree.chain(1))

    def decoded(target, heads, tree, prompts, tokens):
        seen.append((tree.size, prompts, tokens))
        return RoundStats(proposed=(1,), accepted=(1,), emitted=(tree.size,), seconds=(1.0,))

    monkeypatch.setattr(train_tiny_heads, "decoded", decoded)
    target = SimpleNamespace(model=None)
    found = train_tiny_heads.crossed(
        target, None, None, answers, {"3": TokenTree.from_widths((3,))}, {"length": 16, "tokens": 5}
    )
    prompts = [row["tokens"][: row["learned_from"]] for row in answers]
    assert calibrated == [prompts[1::2], prompts[0::2]]
    assert seen == [(2, prompts[0::2], 5), (4, prompts[0::2], 5), (2, prompts[1::2], 5), (4, prompts[1::2], 5)]
    assert found == {"calibrated": {"all": 2.0}, "3": {"all": 4.0}}
    assert train_tiny_heads.summary(found) == {
        "calibrated_tokens_per_round": 2.0,
        "calibrated_over_the_best_regular_tree": 0.5,
    }
