"""`specdec train --kind eagle3` from a file of rows to a drafter that is loaded and decoded with."""

import json

import pytest
import torch

import specdec
from specdec.__main__ import main
from specdec.cli.kinds import trainer_kinds
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.tiny_pair import FOLDER


@pytest.fixture
def arguments(short_texts, tmp_path):
    """The command on a few short texts."""
    given = {
        "model": FOLDER / "draft", "tokenizer": FOLDER / "target", "data": short_texts,
        "output": tmp_path / "run", "length": 48, "steps": 4, "batch": 2, "rows-at-once": 1, "dtype": "float32",
        "draft-vocabulary": 500, "intermediate-size": 32, "depth": 2, "num-tokens": 2, "validate-every": 2,
        "validation-tokens": 8, "prompt-tokens": 6, "max-new-tokens": 12, "log-every": 1,
    }  # fmt: skip
    return ["train", "--kind", "eagle3", *(str(x) for name, value in given.items() for x in (f"--{name}", value))]


def test_it_trains_saves_and_is_loaded(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    run, said = tmp_path / "run", capsys.readouterr().out
    assert "drafts 500 of 4,096 tokens" in said and "1 process on cpu, the model in float32" in said
    assert f"next: specdec bench --target {FOLDER / 'draft'} --drafter {run}" in said
    records = json.loads((run / "log.json").read_text())
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert ["tokens_per_round" in record for record in records] == [False, True, False, True]
    assert all(record["tokens_per_second"] > 0 for record in records) and (run / "training.png").stat().st_size > 10_000
    target = specdec.ModelRunner(specdec.load_model(FOLDER / "draft", torch.float32), mode="eager")
    drafter, tokens = specdec.load_drafter(run, target), torch.tensor([[5, 9, 13, 200]])
    assert drafter.traits.max_depth == 2 and "target_layers (0, 1)" in drafter.describe()
    out = specdec.SpeculativeGenerator(target, drafter).generate(tokens, max_new_tokens=12)
    assert out.sequences.equal(specdec.AutoregressiveGenerator(target).generate(tokens, max_new_tokens=12).sequences)


def test_it_goes_on_from_a_drafter_with_answers_of_the_model(arguments, tmp_path, capsys):
    assert main([*arguments, "--steps", "1"]) == 0
    more = ["--start", str(tmp_path / "run"), "--self-distil", "--output", str(tmp_path / "more"), "--norm-output",
            "--layout", "sglang"]  # fmt: skip
    assert main([*arguments, *more]) == 0
    assert f"the drafter goes on from {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(list((tmp_path / "more/answers_training").glob("*.jsonl"))) == 1
    assert json.loads((tmp_path / "more/config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle3"]
    target = specdec.ModelRunner(specdec.load_model(FOLDER / "draft", torch.float32), mode="eager")
    (first, _), (other, _) = (load_eagle3(target, tmp_path / name) for name in ("run", "more"))
    assert torch.equal(first.draft_tokens, other.draft_tokens) and not other.config.norm_output
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_bad_input_is_one_line(arguments, capsys):
    assert main([*arguments, "--draft-vocabulary", "0"]) == 2
    assert main([*arguments, "--target-layers", "7"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: the draft vocabulary has 1 to 4096 tokens, got 0")]
    assert [line for line in errors if line.startswith("error: features of layer 7 are wanted")]


def test_it_is_a_kind_beside_those_of_packages():
    assert trainer_kinds()["eagle3"].calibrate is None
