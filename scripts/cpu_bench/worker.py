"""A worker of `scripts.bench_cpu`: one method in a process of its own, which answers one JSON line with another.

It runs in the interpreter of the engine it measures, so it imports the standard library and that engine's file alone,
which it is given as a path: `python -P worker.py scripts/cpu_bench/engines/openvino.py`. Messages and their answers:
    {"export": {…}}  calls the engine's `export` with these arguments: {}
    {"load": {…}}    calls its `load`: {"versions": {…}}
    {"call": {…}}    calls what that gave: {"texts", "rounds", "wall", "cpu", "peak"}, seconds, and bytes resident
What raises is answered with {"error": …}, and the worker lives on."""

import importlib.util
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def load_engine(path: Path):
    """The module in a file of `engines`, whatever the file's name hides."""
    spec = importlib.util.spec_from_file_location(f"engine_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions(packages) -> dict[str, str | None]:
    """Versions of distributions; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def peak_bytes() -> int | None:
    """The most memory that was resident since this program began; what its parent held does not count."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def timed(call, arguments: dict) -> dict:
    """What a call gave, and what it took: this process's wall clock and CPU seconds, of all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    texts, rounds = call(**arguments)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    texts = [[int(token) for token in text] for text in texts]
    return {"texts": texts, "rounds": int(rounds), "wall": wall, "cpu": cpu, "peak": peak_bytes()}


class Worker:
    """The engine in a file, and the call that it last loaded."""

    def __init__(self, path: Path):
        self._path = path
        self._engine: Any = None
        self._call: Any = None

    def answer(self, message: dict) -> dict:
        """Do what a message asks; what raises becomes an error."""
        try:
            if self._engine is None:
                self._engine = load_engine(self._path)
            if "export" in message:
                self._engine.export(**message["export"])
                return {}
            if "load" in message:
                self._call = self._engine.load(message["load"])
                return {"versions": versions(self._engine.PACKAGES)}
            return timed(self._call, message["call"])
        except Exception as error:
            said = str(error).splitlines() or [""]
            return {"error": f"{type(error).__name__}: {said[0]}"[:300]}


def main() -> None:
    """Answer line by line until the input ends; what an engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(Path(sys.argv[1]))
    for line in sys.stdin:
        answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
