"""`specdec train --kind mtp` and `--kind peagle` from a file of rows to a drafter that is loaded and decoded with."""

import json

import pytest
import torch

import specdec
from specdec.__main__ import main
from specdec.tiny_pair import FOLDER

KINDS = {
    "mtp": ["--fresh", "qwen3-next"],
    "peagle": ["--draft-vocabulary", "500", "--intermediate-size", "32", "--layers", "1"],
}


@pytest.fixture
def arguments(short_texts, tmp_path):
    """A command on a few short texts, by kind."""
    given = {
        "model": FOLDER / "draft", "tokenizer": FOLDER / "target", "data": short_texts, "output": tmp_path / "run",
        "length": 48, "steps": 2, "batch": 2, "dtype": "float32", "depth": 2, "num-tokens": 2, "validate-every": 2,
        "validation-tokens": 8, "prompt-tokens": 6, "log-every": 1,
    }  # fmt: skip
    options = [str(x) for name, value in given.items() for x in (f"--{name}", value)]
    return lambda kind: ["train", "--kind", kind, *options, *KINDS[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_saves_and_is_loaded(kind, arguments, tmp_path, capsys):
    assert main(arguments(kind)) == 0
    run, said = tmp_path / "run", capsys.readouterr().out
    named = f"mtp:path={run}" if kind == "mtp" else str(run)
    assert f"next: specdec bench --target {FOLDER / 'draft'} --drafter {named}" in said
    about = "1 MTP module, repeated at every depth, new: " if kind == "mtp" else "drafts 500 of 4,096 tokens"
    assert about in said and ("; mask token " in said) == (kind == "peagle")
    records = json.loads((run / "log.json").read_text())
    assert [record["step"] for record in records] == [0, 1] and records[1]["tokens_per_round"] >= 1
    target = specdec.ModelRunner(specdec.load_model(FOLDER / "draft", torch.float32), mode="eager")
    tokens = torch.tensor([[5, 9, 13, 200]])
    drafter = specdec.load_drafter(run, target, **({"kind": "mtp"} if kind == "mtp" else {}))
    out = specdec.SpeculativeGenerator(target, drafter).generate(tokens, max_new_tokens=12)
    assert out.sequences.equal(specdec.AutoregressiveGenerator(target).generate(tokens, max_new_tokens=12).sequences)


def test_they_go_on_from_a_drafter(arguments, tmp_path, capsys):
    for kind in KINDS:
        first, more = ["--output", str(tmp_path / kind)], ["--start", str(tmp_path / kind)]
        fresh = KINDS["mtp"] if kind == "mtp" else []
        command = [
            *(word for word in arguments(kind) if word not in fresh),
            "--steps",
            "1",
            "--validation-prompts",
            "1",
        ]
        assert main([*command, *fresh, *first]) == 0
        assert main([*command, *more, "--output", str(tmp_path / f"more_{kind}")]) == 0
        assert f"from {tmp_path / kind}" in capsys.readouterr().out
    assert main([*arguments("mtp"), *more]) == 2
    eagle3 = ["train", "--kind", "eagle3", *arguments("peagle")[3:-2]]
    assert main([*eagle3, "--start", str(tmp_path / "peagle")]) == 2
    errors = capsys.readouterr().err
    assert f"error: --fresh qwen3-next begins anew, got --start {tmp_path / 'peagle'} too" in errors
    assert f"--kind eagle3: the drafter {tmp_path / 'peagle'} is of the kind peagle" in errors


def test_a_model_without_modules_says_so(arguments, capsys):
    assert main([word for word in arguments("mtp") if word not in KINDS["mtp"]]) == 2
    assert "no weights of MTP modules behind 2 layers in any known layout" in capsys.readouterr().err
