"""A killed training goes on exactly, and several processes follow the curve of one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from medusa.files import WEIGHTS
from scripts.train_medusa import main as train
from specdec.tiny_pair import FOLDER

pytestmark = pytest.mark.scripts


@pytest.fixture
def data(tmp_path):
    """A jsonl of short texts, and the command line over it."""
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"def function_{n}(value):\n    return value + {n}\n"}) + "\n" for n in range(12))
    )
    return [
        "--model",
        str(FOLDER / "draft"),
        "--tokenizer",
        str(FOLDER / "target"),
        "--data",
        str(path),
        "--heads",
        "2",
        "--output-layer",
        "shared",
        "--length",
        "32",
        "--steps",
        "40",
        "--batch",
        "2",
        "--rows-at-once",
        "1",
        "--dtype",
        "float32",
        "--save-every",
        "1",
        "--log-every",
        "1",
    ]


def run(data, output, *more, **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, *more, "-m", "scripts.train_medusa", *data, "--output", str(output)]
    return subprocess.Popen(command, env=environment, text=True, **options)


def log_of(folder) -> list[dict]:
    """The log without the speed, which is another every time."""
    records = json.loads((folder / "log.json").read_text())
    assert all(record.pop("tokens_per_second") > 0 for record in records)
    return records


def test_a_killed_run_goes_on_exactly_where_it_was(data, tmp_path):
    process = run(data, tmp_path / "killed")
    checkpoint, deadline = tmp_path / "killed" / "checkpoint.pt", time.monotonic() + 120
    while (
        not (checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= 3)
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = torch.load(checkpoint, weights_only=True)["step"]
    assert 3 <= reached < 40
    for name in ("killed", "whole"):
        assert train([*data, "--output", str(tmp_path / name)]) == 0
    for name in ("medusa_lm_head.safetensors", "accuracies.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    assert (
        list((tmp_path / "whole" / "logs").rglob("events.out.tfevents.*"))
        and "top-10" in (tmp_path / "whole" / "README.md").read_text()
    )


def test_two_processes_follow_the_curve_of_one(data, tmp_path):
    """Also where each keeps a share of the model's layers: curve, heads, checkpoint and accuracies are those of one.

    By torchrun: where there is no GPU, `accelerate launch` starts one process whatever it is asked for."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    options = {"stdout": subprocess.PIPE, "env": {"CUDA_VISIBLE_DEVICES": ""}}
    data = [*data, "--steps", "6", "--validate-every", "4"]
    runs = {
        "one": run(data, tmp_path / "one", **options),
        "two": run(data, tmp_path / "two", *launcher, **options),
        "shares": run([*data, "--shard"], tmp_path / "shares", *launcher, **options),
    }
    said = {name: process.communicate(timeout=180)[0] for name, process in runs.items()}
    assert not any(process.returncode for process in runs.values())
    assert said["one"].count("1 process on cpu,") == said["two"].count("2 processes on cpu,") == 1
    assert said["shares"].count("2 processes on cpu,") == 1
    read = lambda name, file: (tmp_path / name / file).read_text()
    heads, checkpoint = (
        load_file(tmp_path / "one" / WEIGHTS),
        torch.load(tmp_path / "one" / "checkpoint.pt", weights_only=True),
    )
    one = log_of(tmp_path / "one")
    for name in ("two", "shares"):
        other = log_of(tmp_path / name)
        assert len(one) == len(other) == 6
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert read("one", "accuracies.json") == read(name, "accuracies.json")
        weights = load_file(tmp_path / name / WEIGHTS)
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert weights.keys() == heads.keys() and saved["step"] == checkpoint["step"] == 6
        pairs = [*((weights[key], heads[key]) for key in heads), *zip(saved["heads"], checkpoint["heads"], strict=True)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
