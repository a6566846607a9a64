"""The parent's side of the workers of `scripts.bench_cpu`: one JSON line out, one in."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.cpu_bench.methods import BASE, FILES, OURS, PEERS, TRANSFORMERS, Method
from scripts.cpu_bench.workload import Workload, whole_folder
from scripts.generate_bench.processes import ROOT, read

HERE = Path(__file__).parent


class WorkerFailed(RuntimeError):
    """A worker cannot do what it was asked; the message says why."""


class RemoteWorker:
    """A process that runs `worker.py` with the engine's file `engine`, in the interpreter `python`.

    path: what `import` finds there besides what is installed; None: nothing. Raises WorkerFailed."""

    def __init__(self, engine: Path, python: str = sys.executable, path: Path | None = None, threads: int = 1):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        more = {"PYTHONPATH": str(path or ""), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(HERE / "worker.py"), str(engine)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._errors, env=os.environ | more, text=True,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise WorkerFailed(str(error)) from error

    def ask(self, message: dict, limit: float) -> dict:
        """Its answer. Raises WorkerFailed with its error, or when it ends or takes longer than `limit` seconds."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which reading tells
        if not select.select([process.stdout], [], [], limit)[0]:
            raise WorkerFailed(f"took longer than {limit:g} s")
        line = process.stdout.readline()
        if not line:
            said = read(self._errors) or ["nothing"]
            raise WorkerFailed(f"ended with status {process.wait()}; last said: {said[-1]}"[:300])
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process, and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()


def new_worker(engine: str, options) -> RemoteWorker:
    """A worker of that engine; ours and transformers' import this checkout, that of the base imports the other one."""
    path = {OURS: ROOT, TRANSFORMERS: ROOT, BASE: options.base and options.base.resolve()}.get(engine)
    python = options.python.get(engine, sys.executable)
    return RemoteWorker(HERE / "engines" / f"{FILES[engine]}.py", python, path, options.threads)


def export(engine: str, models: Path, options) -> Path:
    """The folder of the peer's own files, written unless an earlier run did. Raises WorkerFailed."""
    folder = models.with_name(engine)
    if not folder.exists():
        worker = new_worker(engine, options)
        try:
            with whole_folder(folder) as part:
                worker.ask({"export": {"models": str(models), "folder": str(part)}}, options.limit)
        except WorkerFailed as error:
            raise WorkerFailed(f"export: {error}") from error
        finally:
            worker.close()
    return folder


class Launcher:
    """Starts workers; a peer's files are written when its first worker is started."""

    def __init__(self, workload: Workload, options):
        self._workload, self._options = workload, options
        self._exports: dict[str, Path] = {}
        self._failed: dict[str, str] = {}
        self.versions: dict[str, dict] = {}

    def __call__(self, method: Method, draft: str = "draft") -> RemoteWorker:
        """A worker that has loaded. Raises WorkerFailed."""
        settings = self._workload.settings(self._options) | {"kind": method.kind, "mode": method.mode, "draft": draft}
        if method.engine in PEERS:
            settings["exports"] = str(self._exported(method.engine))
        worker = new_worker(method.engine, self._options)
        try:
            self.versions[method.engine] = worker.ask({"load": settings}, self._options.limit)["versions"]
        except WorkerFailed:
            worker.close()
            raise
        return worker

    def _exported(self, engine: str) -> Path:
        if engine in self._failed:
            raise WorkerFailed(self._failed[engine])
        if engine not in self._exports:
            try:
                self._exports[engine] = export(engine, self._workload.models, self._options)
            except WorkerFailed as error:
                self._failed[engine] = str(error)
                raise
        return self._exports[engine]
