"""`specdec train --kind dflash` and `--kind dspark`, from a file of rows to a drafter that is decoded with."""

import json

import pytest
import torch

import specdec
from specdec.__main__ import main
from specdec.drafters.block.loading import load_block
from specdec.tiny_pair import FOLDER


@pytest.fixture
def arguments(short_texts, tmp_path):
    """The options of both kinds on a few short texts."""
    given = {
        "model": FOLDER / "draft", "tokenizer": FOLDER / "target", "data": short_texts,
        "output": tmp_path / "run", "length": 48, "steps": 2, "batch": 2, "rows-at-once": 1, "dtype": "float32",
        "intermediate-size": 32, "layers": 1,
        "block-size": 4, "anchors": 8, "validate-every": 2, "validation-tokens": 8, "log-every": 1,
    }  # fmt: skip
    return [str(x) for name, value in given.items() for x in (f"--{name}", value)]


def target():
    return specdec.ModelRunner(specdec.load_model(FOLDER / "draft", torch.float32), mode="eager")


def require_exact(drafter, runner):
    tokens = torch.tensor([[5, 9, 13, 200]])
    out = specdec.SpeculativeGenerator(runner, drafter).generate(tokens, max_new_tokens=8)
    assert out.sequences.equal(specdec.AutoregressiveGenerator(runner).generate(tokens, max_new_tokens=8).sequences)


def test_dspark_is_trained_saved_and_loaded(arguments, tmp_path, capsys):
    more = ["--markov-rank", "8", "--draft-vocabulary", "500", "--target-layers", "0", "1", "--first-window", "2"]
    assert main(["train", "--kind", "dspark", *arguments, *more]) == 0
    run, said = tmp_path / "run", capsys.readouterr().out
    assert "reads the states (0, 1) and drafts 500 of 4,096 tokens" in said and "mask token 4095" in said
    assert f"next: specdec bench --target {FOLDER / 'draft'} --drafter {run}" in said
    records = json.loads((run / "log.json").read_text())
    assert [record["step"] for record in records] == [0, 1] and "tokens_per_round" in records[-1]
    assert {"slot_0_loss", "slot_3_loss", "acceptance", "confidence_loss"} <= records[0].keys()
    assert (run / "training.png").stat().st_size > 10_000
    runner = target()
    drafter = specdec.load_drafter(run, runner)
    config = drafter.model.config
    assert (config.markov, config.markov_rank, config.confidence, config.from_anchor) == ("vanilla", 8, "markov", True)
    assert config.windows == (2,)
    require_exact(drafter, runner)


def test_dflash_goes_on_from_a_drafter_in_the_other_layout(arguments, tmp_path, capsys):
    given = ["train", "--kind", "dflash", *arguments, "--layout", "z-lab"]
    assert main([*given, "--steps", "1"]) == 0
    more = ["--start", str(tmp_path / "run"), "--output", str(tmp_path / "more"), "--loss", "kl=1", "tv=0.5"]
    assert main([*given, *more]) == 0
    assert f"the drafter goes on from {tmp_path / 'run'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "more/config.json").read_text())["architectures"] == ["DFlashDraftModel"]
    runner = target()
    (first, _), (other, _) = (load_block(runner, tmp_path / name) for name in ("run", "more"))
    assert first.config == other.config and not torch.equal(first.fc.weight, other.fc.weight)
    assert first.config.num_slots == 3 and first.config.output == "target"
    require_exact(specdec.load_drafter(tmp_path / "more", runner), runner)


def test_bad_input_is_one_line_before_anything_is_trained(arguments, tmp_path, capsys):
    bad = {
        "--mask-token 5000": "mask_token must be a token below target_vocab_size 4096, got 5000",
        "--block-size 1": "block_size must be at least 2, the last accepted token and a mask token, got 1",
        "--target-layers 0 2": "target_layers (0, 2) name the state after the last of 2 layers",
        "--loss ce=a": "--loss is NAME=WEIGHT …, of ce, kl, tv, got 'ce=a'",
        "--layout z-lab --draft-vocabulary 500": "the z-lab layout",
    }
    for given, expected in bad.items():
        assert main(["train", "--kind", "dflash", *arguments, *given.split()]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "run/config.json").exists() and not (tmp_path / "run/checkpoint.pt").exists()
