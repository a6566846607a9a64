"""Kernels in C: compiled once, kept, and refused in words where they cannot be."""

import tempfile
from pathlib import Path

import pytest
import torch

from attention.native import library
from attention.native.call import Call, Program, in_programs
from attention.native.library import CannotCompile, Library

needs_compiler = pytest.mark.skipif(library.why_unavailable() is not None, reason=f"{library.why_unavailable()}")
SOURCE = """
#include "vectors.h"
struct add { const float *x; float *y; int64_t count; double factor; };
KERNEL void add(const struct add *a) { for (int64_t i = 0; i < a->count; i++) a->y[i] += a->x[i] * (float)a->factor; }
"""


CACHED = library._folder, library._compiler, library._version


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A folder for compiled kernels that holds none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for cached in CACHED:
        cached.cache_clear()
    yield tmp_path / "cache" / "specdec"
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "add.c"
    path.write_text(SOURCE)
    return path


@needs_compiler
def test_a_call_keeps_the_memory_that_it_reads(own_cache, source):
    x, y = torch.nn.Parameter(torch.ones(1 << 22), requires_grad=False), torch.zeros(2)
    call = Call(Library(source, listed=False), "add", x, y, 2, 1.0)
    x.data = torch.full((2,), 5.0)  # whoever replaces it is to record anew
    call()
    assert y.tolist() == [1.0, 1.0]


@needs_compiler
def test_calls_and_programs_run_kernels(own_cache, source):
    kernels, x, y = Library(source, listed=False), torch.tensor([1.0, 2.0]), torch.zeros(2)
    calls = [Call(kernels, "add", x, y, 2, 0.5), Call(kernels, "add", x, y, 1, 10.0)]
    calls[0]()
    assert y.tolist() == [0.5, 1.0]
    Program(calls)()
    assert y.tolist() == [11.0, 2.0]
    other = lambda: y.zero_()
    joined = in_programs([*calls, other, calls[0]])
    assert [type(step) for step in joined] == [Program, type(other), Call]
    for step in joined:
        step()
    assert y.tolist() == [0.5, 1.0]


@needs_compiler
def test_it_is_compiled_once_for_all_processes(own_cache, source, capfd):
    Library(source, listed=False)["add"]
    assert "compiling add.c" in capfd.readouterr().err
    (kept,) = own_cache.glob("add-*.so")
    Library(source, listed=False)["add"]
    assert not capfd.readouterr().err and list(own_cache.iterdir()) == [kept]
    source.write_text(SOURCE + "\n")
    Library(source, listed=False)["add"]
    assert len(list(own_cache.iterdir())) == 2, "a changed file is compiled again"


@needs_compiler
def test_threads_are_those_of_pytorch(own_cache, source):
    """No second OpenMP library is loaded, whose threads would compete with PyTorch's and ignore its settings."""
    source.write_text(
        SOURCE + "struct ask { int64_t *most; };"
        "KERNEL void ask(const struct ask *a) {\n#ifdef _OPENMP\n*a->most = omp_get_max_threads();\n#endif\n}"
    )
    kernels, most, before = Library(source, listed=False), torch.zeros(1, dtype=torch.int64), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        Call(kernels, "ask", most)()
    finally:
        torch.set_num_threads(before)
    assert most.tolist() in ([0], [3]), "without OpenMP there are no threads"


@needs_compiler
@pytest.mark.parametrize("trouble", ["a file is there", "nobody's home"])
def test_a_cache_that_cannot_be_used_is_done_without(own_cache, monkeypatch, source, tmp_path, trouble):
    if trouble == "a file is there":
        own_cache.parent.write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    Library(source, listed=False)["add"]
    assert library._folder().parent == tmp_path and list(library._folder().glob("add-*.so"))


def test_without_any_folder_it_is_said(own_cache, monkeypatch, tmp_path):
    own_cache.parent.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(own_cache.parent))
    with pytest.raises(CannotCompile, match="no folder"):
        library._folder()


def test_a_folder_that_all_may_write_to_is_not_trusted(own_cache):
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o777)
    assert library._folder() != own_cache


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_broken_library_in_the_cache_is_made_anew(own_cache, source, content, capfd):
    kept = library._place(source, ("-fopenmp",))
    kept.write_bytes(content)
    Library(source, listed=False)["add"]
    assert "compiling add.c" in capfd.readouterr().err and kept.stat().st_size > 1000


@needs_compiler
def test_the_compiler_may_be_several_words(own_cache, source, monkeypatch):
    monkeypatch.setenv("CC", f"env {library._compiler()[0]} -DUNUSED")
    library._compiler.cache_clear()
    Library(source, listed=False)["add"]
    assert library._compiler()[2] == "-DUNUSED" and "env" in library._compiler()[0]


def test_one_library_that_does_not_compile_is_enough_to_do_without(own_cache, source, monkeypatch):
    """Old compilers know some of the constructs only."""
    source.write_text("not C")
    monkeypatch.setattr(Library, "known", [Library(source, listed=False)])
    library.why_unavailable.cache_clear()
    try:
        assert library.why_unavailable() is not None
    finally:
        library.why_unavailable.cache_clear()


def test_a_machine_without_compiler_is_told_so(own_cache, source, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CannotCompile, match=r"there is no C compiler \(cc, gcc, clang\)"):
        Library(source, listed=False)["add"]


@needs_compiler
def test_what_the_compiler_says_is_told(own_cache, source):
    source.write_text("not C")
    with pytest.raises(CannotCompile, match="fails: .*add.c"):
        Library(source, listed=False)["add"]


def test_a_compiler_that_cannot_be_run_is_named(own_cache, source, monkeypatch, tmp_path):
    fake = tmp_path / "fake-cc"
    fake.write_text("no program")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    with pytest.raises(CannotCompile, match=r"fake-cc (cannot be run|fails)"):
        Library(source, listed=False)["add"]


@needs_compiler
def test_exponentials_are_exact_to_two_roundings(own_cache, source):
    source.write_text(
        '#include "vectors.h"\nstruct e { const float *x; float *y; int64_t n; };\nKERNEL void e(const struct e *a) '
        "{ for (int64_t i = 0; i < a->n; i += WIDTH) store(a->y + i, exponential(load(a->x + i))); }"
    )
    x = torch.linspace(-87, 88, 160000)
    y = torch.empty_like(x)
    Call(Library(source, listed=False), "e", x, y, len(x))()
    assert float((y.double() / x.double().exp() - 1).abs().max()) < 2 * torch.finfo(torch.float32).eps
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), -1000.0] * 4)
    out = torch.empty_like(special)
    Call(Library(source, listed=False), "e", special, out, 16)()
    assert out[0].isnan() and out[1] > 1e38 and 0 <= out[2] < 2e-38 and 0 <= out[3] < 2e-38
