"""Compiles kernels in C on the machine that runs them, for its processor; the results are kept between processes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
NATIVE = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
# with ivopts GCC spills the sums of a tile; the last two let it choose between numbers without branches
FLAGS = ("-std=gnu11", "-O3", NATIVE, "-fPIC", "-fvisibility=hidden", "-fno-ivopts", "-fno-math-errno",
         "-fno-trapping-math", f"-I{HERE}")  # fmt: skip
TIMEOUT = 120  # seconds of one run of the compiler
_lock = threading.Lock()


class CannotCompile(RuntimeError):
    """There is no C compiler, or it fails."""


class Library:
    """The kernels of one C file, compiled on first use."""

    def __init__(self, source: Path):
        self._source = source
        self._loaded: ctypes.CDLL | None = None

    def __getitem__(self, name: str):
        """The function `name`. Raises CannotCompile."""
        with _lock:
            self._loaded = self._loaded or _load(self._source)
        return self._loaded[name]


PROGRAM = Library(HERE / "program.c")


@cache
def why_unavailable() -> str | None:
    """Why no kernels can be compiled here; None: they can."""
    try:
        PROGRAM["run"]
    except CannotCompile as error:
        return str(error)
    return None


def _load(source: Path) -> ctypes.CDLL:
    try:
        # PyTorch has loaded the OpenMP library that its own threads belong to
        return ctypes.CDLL(str(_compiled(source, "-fopenmp")), os.RTLD_NOW)
    except (CannotCompile, OSError):
        return ctypes.CDLL(str(_compiled(source)), os.RTLD_NOW)


def _compiled(source: Path, *more: str) -> Path:
    """The shared library of `source`, from the cache or made now."""
    compiler = _compiler()
    texts = [path.read_bytes() for path in (source, *sorted(HERE.glob("*.h")))]
    about = repr((compiler, FLAGS[:-1], more, _processor())).encode()
    name = f"{source.stem}-{hashlib.sha256(b'|'.join([*texts, about])).hexdigest()[:20]}.so"
    if (kept := _folder() / name).exists():
        return kept
    print(f"specdec: compiling {source.name} for this processor, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=_folder()) as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, name)
        # linked without OpenMP's own library, of which a second one would bring threads of its own
        _run([compiler, *FLAGS, *more, "-c", str(source), "-o", str(compiled)])
        _run([compiler, "-shared", *_LINKING, str(compiled), "-lm", "-o", str(linked)])
        linked.replace(kept)  # at once: other processes see all of it or nothing
    return kept


_LINKING = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise CannotCompile(f"{command[0]} fails: {' '.join(done.stderr.split())[:300]}")


@cache
def _compiler() -> str:
    """The path of the C compiler: the one that the variable CC names, or one of COMPILERS."""
    named = os.environ.get("CC", "").split()
    names = named[:1] or COMPILERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise CannotCompile(f"there is no C compiler ({', '.join(names)})")
    return found


@cache
def _folder() -> Path:
    """Where compiled kernels are kept: the user's cache, or else a folder for this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "specdec")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="specdec-"))


def _processor() -> str:
    """What the compiled code depends on: the kind of processor and the instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    )
