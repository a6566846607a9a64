"""Which modes there are, with and without a C compiler."""

import pytest
import torch

import specdec
from attention.native import library
from attention.recording import direct_kernels, native_sink
from specdec.model.fusion import native
from specdec.model.modes import MODES, best_mode, require_mode
from tests.families import build, ragged_prompts

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(library, "why_unavailable", lambda: "there is no C compiler (cc, gcc, clang)")


def test_auto_takes_kernels_in_c_on_a_cpu_only():
    assert best_mode(GPU) == "graph"
    assert best_mode(CPU) == ("graph" if library.why_unavailable() else "compile")


def test_without_a_compiler_auto_records_operations_and_compile_is_refused(no_compiler):
    (ids, mask), model = ragged_prompts(2), build("llama")
    generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(build("llama", seed=1)))
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    assert generator.generate(ids, mask, max_new_tokens=12).sequences.equal(expected)
    assert generator.target.mode == "graph" == best_mode(CPU)
    with pytest.raises(
        ValueError, match=r'mode="compile" compiles kernels in C .* no C compiler .* mode="graph" needs'
    ):
        specdec.SpeculativeGenerator(build("llama"), None, mode="compile")
    with pytest.raises(ValueError, match="no C compiler"):
        generator.target.mode = "compile"
    require_mode("compile", GPU)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_an_unknown_mode_is_named(device):
    for mode in MODES[:2]:
        require_mode(mode, device)
    with pytest.raises(ValueError, match="mode must be one of eager, graph, compile, got 'fast'"):
        require_mode("fast", device)


@pytest.mark.skipif(bool(library.why_unavailable()), reason="no C compiler")
def test_a_prompt_runs_through_kernels_in_c_without_a_recording(monkeypatch):
    found, taken, linear = [], [], native.linear
    monkeypatch.setattr(native, "linear", lambda *given: taken.append(linear(*given)) or taken[-1])
    for mode in ("graph", "compile"):
        runner = specdec.ModelRunner(build("llama"), mode=mode)
        runner.reserve([16])
        found.append(runner.forward([runner.cache.add()], torch.arange(5, 12), [7]).logits)
        assert bool(taken) == (mode == "compile") and None not in taken
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_kernels_in_c_are_not_used_where_gradients_are_wanted(grad):
    with direct_kernels(True), torch.set_grad_enabled(grad):
        assert (native_sink() is None) == grad
    assert native_sink() is None
