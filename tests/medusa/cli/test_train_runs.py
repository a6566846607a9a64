"""A killed training goes on exactly, and several processes follow the curve of one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from scripts import train_medusa as script
from specdec.tiny_pair import FOLDER


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


def run(data, output, *more) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *more, "-m", "scripts.train_medusa", *data, "--output", str(output)], env=environment
    )


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
    script.main([*data, "--output", str(tmp_path / "killed")])
    script.main([*data, "--output", str(tmp_path / "whole")])
    for name in ("log.json", "medusa_lm_head.safetensors", "accuracies.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (
        list((tmp_path / "whole" / "logs").rglob("events.out.tfevents.*"))
        and "top-10" in (tmp_path / "whole" / "README.md").read_text()
    )


def test_two_processes_follow_the_curve_of_one(data, tmp_path):
    two = run(
        [*data, "--steps", "6"],
        tmp_path / "two",
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    script.main([*data, "--steps", "6", "--output", str(tmp_path / "one")])
    assert two.wait(timeout=180) == 0
    one, other = (json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(other) == 6
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
