"""Kernels in C: compiled once, kept, and refused in words where they cannot be."""

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


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A folder for compiled kernels that holds none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (library._folder, library._compiler):
        cached.cache_clear()
    yield tmp_path / "cache" / "specdec"
    for cached in (library._folder, library._compiler):
        cached.cache_clear()


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "add.c"
    path.write_text(SOURCE)
    return path


@needs_compiler
def test_calls_and_programs_run_kernels(own_cache, source):
    kernels, x, y = Library(source), torch.tensor([1.0, 2.0]), torch.zeros(2)
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
    Library(source)["add"]
    assert "compiling add.c" in capfd.readouterr().err
    (kept,) = own_cache.glob("add-*.so")
    Library(source)["add"]
    assert not capfd.readouterr().err and list(own_cache.iterdir()) == [kept]
    source.write_text(SOURCE + "\n")
    Library(source)["add"]
    assert len(list(own_cache.iterdir())) == 2, "a changed file is compiled again"


@needs_compiler
def test_threads_are_those_of_pytorch(own_cache, source):
    """No second OpenMP library is loaded, whose threads would compete with PyTorch's and ignore its settings."""
    source.write_text(
        SOURCE + "struct ask { int64_t *most; };"
        "KERNEL void ask(const struct ask *a) {\n#ifdef _OPENMP\n*a->most = omp_get_max_threads();\n#endif\n}"
    )
    kernels, most, before = Library(source), torch.zeros(1, dtype=torch.int64), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        Call(kernels, "ask", most)()
    finally:
        torch.set_num_threads(before)
    assert most.tolist() in ([0], [3]), "without OpenMP there are no threads"


@needs_compiler
def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch, source, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library._folder.cache_clear()
    try:
        Library(source)["add"]
        assert library._folder().name.startswith("specdec-")
    finally:
        library._folder.cache_clear()


def test_a_machine_without_compiler_is_told_so(own_cache, source, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CannotCompile, match=r"there is no C compiler \(cc, gcc, clang\)"):
        Library(source)["add"]


@needs_compiler
def test_what_the_compiler_says_is_told(own_cache, source):
    source.write_text("not C")
    with pytest.raises(CannotCompile, match="fails: .*add.c"):
        Library(source)["add"]


def test_a_compiler_that_cannot_be_run_is_named(own_cache, source, monkeypatch, tmp_path):
    fake = tmp_path / "fake-cc"
    fake.write_text("no program")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    with pytest.raises(CannotCompile, match=r"fake-cc (cannot be run|fails)"):
        Library(source)["add"]


@needs_compiler
def test_exponentials_are_exact_to_two_roundings(own_cache, source):
    source.write_text(
        '#include "vectors.h"\nstruct e { const float *x; float *y; int64_t n; };\nKERNEL void e(const struct e *a) '
        "{ for (int64_t i = 0; i < a->n; i += WIDTH) store(a->y + i, exponential(load(a->x + i))); }"
    )
    x = torch.linspace(-87, 88, 160000)
    y = torch.empty_like(x)
    Call(Library(source), "e", x, y, len(x))()
    assert float((y.double() / x.double().exp() - 1).abs().max()) < 2 * torch.finfo(torch.float32).eps
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), -1000.0] * 4)
    out = torch.empty_like(special)
    Call(Library(source), "e", special, out, 16)()
    assert out[0].isnan() and out[1] > 1e38 and 0 <= out[2] < 2e-38 and 0 <= out[3] < 2e-38
