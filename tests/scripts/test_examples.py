"""The examples run as a user starts them, and print what they teach."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "scripts/examples").glob("[!_]*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_fits_a_screen(name):
    assert len((ROOT / "scripts/examples" / f"{name}.py").read_text().splitlines()) <= 40
    command = [sys.executable, "-m", f"scripts.examples.{name}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tokens per round" in done.stdout


def test_there_are_four():
    assert EXAMPLES == ["draft_model", "medusa_heads", "own_acceptance_rule", "own_drafter"]
