import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from scripts import train_tiny_pair as script
from scripts.common.quality import expected_acceptance, parses_as_python, repeats_itself
from scripts.common.tiny_corpus import HELD_OUT
from scripts.common.tiny_models import distillation_loss
from scripts.common.training_loop import train
from specdec.loading import load_model
from specdec.training.checkpoint import save_atomically, write_json

torch.set_num_threads(1)  # tiny tensors: waiting threads would cost ten times more on shared cores

ROOT = Path(__file__).parents[2]
PROMPT_FILES = [name for name in HELD_OUT if not name.startswith("test/")] + ["test/test_csv.py", "test/test_bisect.py"]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """Part of this interpreter's standard library: what the prompts need, and 81 files to train on (the smoke preset
    takes every 40th).
    """
    source, folder = Path(sysconfig.get_paths()["stdlib"]), tmp_path_factory.mktemp("stdlib")
    training = [
        path.name
        for path in sorted(source.glob("*.py"))
        if path.name not in HELD_OUT and 2_000 < path.stat().st_size < 40_000
    ][:81]
    for name in [*PROMPT_FILES, *training]:
        if (source / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


def arguments(output, stdlib):
    return ["--output", str(output), "--preset", "smoke", "--device", "cpu", "--stdlib", str(stdlib)]


def run_smoke(output, stdlib):
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.main(arguments(output, stdlib))
    finally:
        logging.set_verbosity(verbosity)
    return output / "tiny_pair"


@pytest.fixture(scope="module")
def pair(stdlib, tmp_path_factory):
    """The folder that an uninterrupted smoke run made."""
    return run_smoke(tmp_path_factory.mktemp("whole"), stdlib)


def test_the_finished_pair_loads(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    text = "def f(x):\n    return x + 1234  # naïve ☃\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and tokenizer.eos_token and tokenizer.pad_token
    for name in ("target", "draft"):
        model = load_model(pair / name)
        assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer) == 512
        assert model(tokenizer(text, return_tensors="pt").input_ids).logits.isfinite().all()
    assert {file.suffix for file in pair.rglob("*") if file.is_file()} == {
        ".json",
        ".safetensors",
    }  # nothing half-written is left over


def test_the_record_and_the_prompts_are_complete(pair):
    record, prompts = (json.loads((pair / name).read_text()) for name in ("record.json", "prompts.json"))
    for name in ("target", "draft"):
        assert record[name]["parameters"] == load_model(pair / name).num_parameters()
        assert record[name]["held_out_loss"] == pytest.approx(
            record[name]["log"][-1]["held_out_loss"], abs=0.05
        )  # bf16 against fp32
        assert [entry["step"] for entry in record[name]["log"]] == [0, 5]
        assert record[name]["log"][-1]["loss"] < record[name]["log"][0]["loss"]
    assert (
        record["seed"] == 0
        and 0 < record["expected_acceptance"] < 1
        and 0 <= record["share_of_greedy_completions_that_parse"] <= 1
    )
    assert set(record["versions"]) == {"python", "torch", "transformers"} and record["settings"]["context"] == 64
    assert {kind: len(entries) for kind, entries in prompts.items()} == dict.fromkeys(
        ["code", "prose", "data", "editing"], 8
    )
    assert {entry["source"] for entries in prompts.values() for entry in entries} <= set(HELD_OUT)


def weights(pair):
    return {
        f"{name}.{key}": value
        for name in ("target", "draft")
        for key, value in load_model(pair / name).state_dict().items()
    }


def untimed(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_pair(ours, theirs):
    resumed, whole = weights(ours), weights(theirs)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    resumed, whole = (json.loads((folder / "record.json").read_text()) for folder in (ours, theirs))
    assert resumed["expected_acceptance"] == whole["expected_acceptance"]
    for name in ("target", "draft"):
        assert untimed(resumed[name].pop("log")) == untimed(whole[name].pop("log")) and resumed[name] == whole[name]


KILLED = """
import functools, os, signal, sys
from scripts import train_tiny_pair as script
from scripts.common import tiny_models

def loss(*logits, true_loss=tiny_models.distillation_loss, seen=[]):
    seen.append(1)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return true_loss(*logits)

tiny_models.distillation_loss, script.train = loss, functools.partial(script.train, save_every_s=0)
script.main(sys.argv[1:])
"""


def test_a_run_that_was_killed_is_completed_to_the_same_pair(pair, stdlib, tmp_path):
    options = dict(cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments(tmp_path, stdlib)], **options)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (
        torch.load(tmp_path / "work" / "draft.pt", weights_only=True)["step"] == 3
        and not (tmp_path / "tiny_pair" / "record.json").exists()
    )
    assert_same_pair(run_smoke(tmp_path, stdlib), pair)


def test_a_run_interrupted_in_two_other_stages_is_completed_to_the_same_pair(pair, stdlib, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    def stop_at_step_3(model, loss_of, **options):
        return train(model, lambda step: stop() if step == 3 else loss_of(step), save_every_s=0, **options)

    for name, stopped in (("train", stop_at_step_3), ("draw_samples", stop)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(script, name, stopped)
            run_smoke(tmp_path, stdlib)
        torch.manual_seed(99)  # a new process has another state of the global generator
    assert_same_pair(run_smoke(tmp_path, stdlib), pair)


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "state.pt"
    save_atomically({"step": 1}, path)
    write_json({"a": 1}, tmp_path / "a.json")
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_atomically({"step": lambda: 2}, path)
    with pytest.raises(TypeError):
        write_json({"a": object()}, tmp_path / "a.json")
    assert torch.load(path, weights_only=True) == {"step": 1} and json.loads((tmp_path / "a.json").read_text()) == {
        "a": 1
    }


HALF = "    y = x\n" * 8


@pytest.mark.parametrize(
    ("prompt", "completion", "parses"),
    [
        ("def f(x):\n", "    return x\n", True),
        ("def f(x):", "\n    return x", True),
        ("def f(x):\n", HALF + "    return (y +", True),  # the unfinished last line is dropped
        ("def f(x):\n", HALF + "    z = (y +\n    1 +\n    2 +", True),  # three unfinished lines are dropped
        ("def f(x):\n", HALF + "    z = (y +\n    1 +\n    2 +\n    3 +", False),  # four are too many
        ("def f(x):\n", "    y = x\n    return (y +", False),  # half of the completion must stay
        ("def f(x):\n", "  y = x\n      return y\n    z\n  w = 1\n  v = 2\n  u = 3\n  t = 4\n", False),
        ("x = 1\n", "y = = 2\n" + "z = 3\n" * 8, False),  # an error early on
        ("x = 'a\0b'\n", "y = 2\n", False),
        ("x = 1\n", "", True),
    ],
)
def test_parses_as_python(prompt, completion, parses):
    assert parses_as_python(prompt, completion) is parses


def test_distillation_loss_is_zero_on_equal_models_and_right_by_hand():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * (0.5 * np.log(2) - 0.25 * np.log(2)) + 0.5 * 0.25
    assert distillation_loss(q.log()[None, None], p.log()[None, None]).item() == pytest.approx(expected, rel=1e-5)


def test_expected_acceptance_of_a_model_with_itself_is_one(pair):
    target, draft = (load_model(pair / name, torch.float32) for name in ("target", "draft"))
    stream = np.random.default_rng(0).integers(0, 512, 700).astype(np.uint16)
    cpu = torch.device("cpu")
    assert expected_acceptance(target, target, stream, 64, cpu) == pytest.approx(1, abs=1e-5)
    one, other = (
        expected_acceptance(target, draft, stream, 64, cpu),
        expected_acceptance(draft, target, stream, 64, cpu),
    )
    assert one == pytest.approx(other) and one < 0.999


def test_repeating_lines_are_counted_as_such():
    assert repeats_itself("x = 1\n" * 5) and repeats_itself("a\nb\na\nb\na")
    assert not repeats_itself("a = 1\nb = 2\nc = 3\nd = 4") and not repeats_itself("x\nx\nx")
