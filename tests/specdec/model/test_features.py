"""Features are transformers' own hidden states, for prompts and for tree nodes, eager, captured and compiled."""

import pytest
import torch

import specdec
from specdec.model.features import Features
from specdec.model.fusion import compiled_blocks
from specdec.model.graph_runner import GraphRunner
from tests.attention.hf.test_twin import state_of
from tests.families import CONFIGS, build

pytestmark = pytest.mark.seam
TREE = specdec.TokenTree.from_widths((2, 2))
PROMPT, NODES = torch.arange(5, 19), torch.tensor([30, 41, 52, 33, 44, 25, 36])
LAST = 3  # of three blocks: after the final norm
LAYERS = (0, 2, LAST)


@torch.no_grad()
def expected(model, layers, tokens) -> torch.Tensor:
    """`[L, sum of widths]`: transformers' own hidden states of one text."""
    out = model(tokens[None].to(model.device), output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[layer][0] for layer in layers], -1)


def made(model, mode: str) -> specdec.ModelRunner:
    runner = specdec.ModelRunner(model)
    runner.mode = mode
    runner.reserve([60] * 12)
    return runner


def run(runner, tokens, count, *more, **options):
    """A forward over a new sequence, the third of its kind, so that it is captured where it can be."""
    for _ in range(3):
        sequence = runner.cache.add()
        out = runner.forward([sequence], tokens.to(runner.device), [count], *more, **options)
    return sequence, out


def check(model, mode: str, layers) -> None:
    """A whole prompt, some of its tokens, and the nodes of a tree after it."""
    runner, features = made(model, mode), Features(layers, "accepted")
    indices = (LAST,) if layers == "output" else layers
    close = lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    sequence, out = run(runner, PROMPT, 14, features=features)
    whole = expected(model, indices, PROMPT)
    close(out.features, whole)
    keep = torch.tensor([3, 13], device=runner.device)
    kept, every = (run(runner, PROMPT, 14, None, keep, Features(layers, tokens))[1] for tokens in ("last", "prompt"))
    close(kept.features, whole[[3, 13]])
    close(every.features, whole)
    assert kept.logits.shape == every.logits.shape == out.logits[keep].shape
    close(every.logits, out.logits[keep])
    nodes = runner.forward([sequence], NODES.to(runner.device), [7], TREE, features=features).features
    for node in range(TREE.size):
        text = torch.cat([PROMPT, NODES[[0, *TREE.path(node)]]])
        close(nodes[node], expected(model, indices, text)[-1])


@pytest.mark.parametrize("layers", ["output", LAYERS, (1,), (2, 2, 0)], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_features_are_the_hidden_states_of_transformers(family, layers):
    model = build(family)
    model.set_attn_implementation("eager")  # the default one leaves Gemma 2's softcap out in transformers 5.17
    check(model, "eager", layers)


@pytest.mark.parametrize("mode", ["graph", "compile"])
@pytest.mark.parametrize("layers", ["output", LAYERS], ids=str)
def test_features_of_replayed_forwards_are_the_same(mode, layers, monkeypatch):
    """On a CPU, where a graph calls its function again, with fused projections and with blocks traced by dynamo."""
    monkeypatch.setattr(GraphRunner, "captures_ragged", True)
    monkeypatch.setattr(compiled_blocks, "BACKEND", "eager")
    compiled_blocks._compiler.cache_clear()
    check(build("llama"), mode, layers)
    compiled_blocks._compiler.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graph", "compile"])
@pytest.mark.parametrize("layers", ["output", LAYERS], ids=str)
def test_features_of_captured_forwards_are_the_same(mode, layers):
    check(build("llama").to("cuda"), mode, layers)


def test_the_model_and_its_hooks_stay_as_they_are():
    """Not a module or hook differs, and hooks on blocks are called as often as without features."""
    model = build("llama")
    expected(model, (0,), PROMPT)  # transformers installs hooks of its own the first time
    calls = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    runner, before = made(model, "eager"), state_of(model)
    calls.clear()
    run(runner, PROMPT, 14)
    without = len(calls)
    _, out = run(runner, PROMPT, 14, features=Features(LAYERS))
    assert len(calls) == 2 * without == 6 and state_of(model) == before
    handle.remove()
    slot = runner.adapter.slot
    assert slot.hidden is None and not slot.inputs and not slot.wanted, "no tensor outlives its forward"
    torch.testing.assert_close(out.features, expected(model, LAYERS, PROMPT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["input", (), (1, -1), (1, "2"), [1], (True,)], ids=str)
def test_what_is_no_layer_is_an_error_that_names_it(layers):
    with pytest.raises(ValueError, match="layer.* got "):
        Features(layers)


def test_an_unknown_layer_is_an_error_before_anything_is_appended():
    runner = made(build("llama"), "eager")
    sequence = runner.cache.add()
    with pytest.raises(ValueError, match="layer 4 .* LlamaForCausalLM has hidden states 0 .* to 3"):
        runner.forward([sequence], PROMPT, [14], features=Features((1, 4)))
    assert runner.cache.length(sequence) == 0
    with pytest.raises(ValueError, match="tokens must be one of last, accepted, prompt, got 'all'"):
        Features(tokens="all")
