"""A process of its own for each method of `scripts.bench_generate`, and the records that a later run takes over."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from specdec.training.checkpoint import write_json

ROOT = Path(__file__).parents[2]


def run_child(method: str, arguments: Sequence[str], limit: float) -> dict:
    """The record that a process of its own printed last, with its `seconds`, and the `error` if there was one."""
    command = [sys.executable, "-m", "scripts.bench_generate", *arguments, "--method", method]
    began, problem = time.perf_counter(), None
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        # files, since compile workers that outlive their parent would keep a pipe open; a session, to kill them with it
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(limit)
            if status:
                problem = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            problem = f"took longer than {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed, said = (read(file) for file in (out, errors))
    nothing = {"method": method, "environment": None, "rows": [], "error": None}
    record = next(filter(None, map(record_in, reversed(printed))), nothing)
    if problem is not None:
        record["error"] = f"{problem}; last said: {said[-1]}" if said else problem
    return record | {"seconds": time.perf_counter() - began}


def read(file) -> list[str]:
    """The lines of an open file that are not blank."""
    file.seek(0)
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def record_in(line: str) -> dict | None:
    """The record that a line holds; None for other lines and for the half of one that a kill left."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and "method" in found else None


def kept(folder: Path | None, method: str, settings: dict) -> dict | None:
    """The record that an earlier run with the same settings left in `folder`."""
    path = None if folder is None else folder / f"{method}.json"
    if path is None or not path.exists():
        return None
    found = json.loads(path.read_text())
    return found["record"] if found["settings"] == settings else None


def keep(folder: Path | None, record: dict, settings: dict) -> None:
    """Leave a record for a later run, unless it failed."""
    if folder is not None and record["error"] is None:
        write_json({"settings": settings, "record": record}, folder / f"{record['method']}.json")
