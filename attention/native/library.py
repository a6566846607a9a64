"""Compiles kernels in C on the machine that runs them, for its processor; the results are kept between processes."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
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
LINKING = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
TIMEOUT = 120  # seconds of one run of the compiler
_lock = threading.Lock()


class CannotCompile(RuntimeError):
    """There is no C compiler, it fails, or what it makes cannot be kept or loaded."""


class Library:
    """The kernels of one C file, compiled on first use."""

    known: "list[Library]" = []

    def __init__(self, source: Path, listed: bool = True):
        self._source = source
        self._loaded: ctypes.CDLL | None = None
        if listed:
            self.known.append(self)

    def __getitem__(self, name: str):
        """The function `name`. Raises CannotCompile."""
        return self.load()[name]

    def load(self) -> ctypes.CDLL:
        """Compile it, if that has not been done. Raises CannotCompile."""
        with _lock:
            self._loaded = self._loaded or _load(self._source)
        return self._loaded


PROGRAM = Library(HERE / "program.c")


@cache
def why_unavailable() -> str | None:
    """Why kernels cannot be compiled here; None: all of them have been."""
    try:
        for library in Library.known:
            library.load()
    except CannotCompile as error:
        return str(error)
    return None


def _load(source: Path) -> ctypes.CDLL:
    """With threads where the linked code finds PyTorch's OpenMP library, else without."""
    try:
        return _opened(source, "-fopenmp")
    except CannotCompile:
        return _opened(source)


def _opened(source: Path, *more: str) -> ctypes.CDLL:
    """The library of `source`; one that was kept and cannot be loaded is made anew."""
    kept = _place(source, more)
    for _ in range(2):
        if not kept.exists():
            _compile(source, more, kept)
        try:
            return ctypes.CDLL(str(kept), os.RTLD_NOW)
        except OSError as error:
            why = f"{kept} cannot be loaded: {error}"
            kept.unlink(missing_ok=True)
    raise CannotCompile(why)


def _place(source: Path, more: tuple[str, ...]) -> Path:
    """Where the library of `source` is kept: under a name that tells all that it depends on."""
    texts = [path.read_bytes() for path in (source, *sorted(HERE.glob("*.h")))]
    about = repr((_compiler(), _version(), platform.libc_ver(), FLAGS[:-1], more, _processor())).encode()
    return _folder() / f"{source.stem}-{hashlib.sha256(b'|'.join([*texts, about])).hexdigest()[:20]}.so"


def _compile(source: Path, more: tuple[str, ...], kept: Path) -> None:
    print(f"specdec: compiling {source.name} for this processor{' ' * bool(more)}{' '.join(more)}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            compiled, linked = Path(folder, "kernels.o"), Path(folder, kept.name)
            # linked without OpenMP's own library, of which a second one would bring threads of its own
            _run([*_compiler(), *FLAGS, *more, "-c", str(source), "-o", str(compiled)])
            _run([*_compiler(), "-shared", *LINKING, str(compiled), "-lm", "-o", str(linked)])
            with linked.open("rb") as file:
                os.fsync(file.fileno())
            linked.replace(kept)  # at once: other processes see all of it or nothing
    except OSError as error:
        raise CannotCompile(f"what {source.name} is compiled to cannot be kept: {error}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise CannotCompile(f"{command[0]} fails: {' '.join(done.stderr.split())[:300]}")
    return done.stdout


@cache
def _compiler() -> tuple[str, ...]:
    """The C compiler: what the variable CC says, options included, or the first of COMPILERS that there is."""
    named = shlex.split(os.environ.get("CC", ""))
    names = named[:1] or COMPILERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise CannotCompile(f"there is no C compiler ({', '.join(names)})")
    return found, *named[1:]


@cache
def _version() -> str:
    return _run([*_compiler(), "--version"])


@cache
def _folder() -> Path:
    """Where compiled kernels are kept: in the user's cache, or else in a folder for temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    for parent in (_cache, tempfile.gettempdir):
        try:
            folder = Path(parent(), "specdec" if parent is _cache else f"specdec-{user}")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            if hasattr(os, "getuid") and (about.st_uid != user or about.st_mode & stat.S_IWOTH):
                continue  # others may have put code there
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except (OSError, RuntimeError):  # no such user, no room, no rights
            continue
    raise CannotCompile("there is no folder in which compiled kernels can be kept")


def _cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")


def _processor() -> str:
    """What the compiled code depends on: the kind of processor and the instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    )
