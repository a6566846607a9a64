"""The examples run as a user starts them, and print what they teach."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "scripts/examples").glob("[!_]*.py"))
RUN_EACH = """
import runpy, sys
for name in sys.argv[1:]:
    print("####", name)
    runpy.run_module(f"scripts.examples.{name}", run_name="__main__")
"""


def test_examples_run_and_fit_a_screen():
    """All in one process, as importing PyTorch and transformers takes most of the time; each with names of its own."""
    for name in EXAMPLES:
        assert len((ROOT / "scripts/examples" / f"{name}.py").read_text().splitlines()) <= 40, name
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN_EACH, *EXAMPLES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    printed = dict(part.split("\n", 1) for part in done.stdout.split("#### ")[1:])
    assert list(printed) == EXAMPLES and all("tokens per round" in text for text in printed.values()), printed


def test_there_are_four():
    assert EXAMPLES == ["draft_model", "medusa_heads", "own_acceptance_rule", "own_drafter"]
