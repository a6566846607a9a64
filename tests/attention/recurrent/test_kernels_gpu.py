"""The kernels of recurrent layers at the shapes of published models, and captured rounds over them, on a GPU."""

import pytest
import torch

import specdec
from attention.recurrent.nodes import replay_nodes, run_nodes
from scripts.bench_recurrent import KINDS, random_layer, sees_of, tree_of
from specdec import TokenTree
from tests.families import build
from tests.specdec.generation.test_recurrent import MIXERS, OnThePath, assert_greedy, ragged_prompts, texts_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_and_a_chain_of_64_at_the_27b_shape(kind, rows):
    layer = random_layer(kind, "27b", rows, 64, torch.device("cuda"))
    for sees in (None, sees_of(tree_of(64), torch.device("cuda")), sees_of(TokenTree.chain(63), torch.device("cuda"))):
        expected = layer.run(sees, "reference", torch.float64)
        ours = layer.run(sees, "triton").double()
        assert (ours - expected).norm() <= (1e-2 if kind == "convolution" else 2e-5) * expected.norm()
        for kept, given in zip(layer.kept, layer.inputs, strict=True):
            assert kept[layer.cells].equal(given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_reads_lengths_and_paths_where_they_lie(kind):
    """Captured once, replayed for other cells, trees, paths and counts."""
    device = torch.device("cuda")
    layer, sees = random_layer(kind, "27b", 4, 24, device), sees_of(tree_of(24), device)
    places, counts = (
        torch.zeros(4, 6, dtype=torch.int64, device=device),
        torch.zeros(4, dtype=torch.int64, device=device),
    )
    states = layer.states[None]
    kept = tuple(x[None] for x in layer.kept)

    def run():
        out = run_nodes(layer.kind, states[0], layer.cells, layer.inputs, layer.reads, sees, layer.constants, layer.kept,
                        impl="triton")  # fmt: skip
        replay_nodes(layer.kind, states, kept, layer.cells, places, counts, layer.constants, impl="triton")
        return out

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        torch.manual_seed(seed)
        layer.cells.copy_(torch.randperm(5, device=device)[:4])
        sees.copy_(sees_of(TokenTree.chain(23) if seed == 1 else tree_of(24), device))
        places.copy_(torch.tensor([[0, 1, 2, 4, 5, 9]] * 4))
        counts.copy_(torch.tensor([0, 6, seed, 3]))
        before = states.clone()
        graph.replay()
        expected = run_nodes(layer.kind, before[0], layer.cells, layer.inputs, layer.reads, sees, layer.constants,
                             impl="reference")  # fmt: skip
        assert (out - expected).norm() <= (2e-2 if kind == "convolution" else 1e-3) * expected.norm()
        replay_nodes(layer.kind, before, kept, layer.cells, places, counts, layer.constants, impl="reference")
        assert torch.allclose(states.float(), before.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", MIXERS)
def test_captured_rounds_on_a_gpu(family):
    model = build(family).to("cuda")
    ids, mask = (x.to("cuda") for x in ragged_prompts(3))
    prompts = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=None)
    for drafter in (None, OnThePath(texts_of(model, prompts, 24))):
        generator = specdec.SpeculativeGenerator(specdec.ModelRunner(model, page_size=8, mode="graph"), drafter)
        out = generator.generate(ids, mask, max_new_tokens=24, eos_token_id=[])
        assert out.stats.host is None
        assert_greedy(model, out.sequences, expected)
    assert out.stats.pooled.acceptance_rate > 0.05
