"""Blocks through torch.compile, as a GPU runs them: traced here, since writing C++ takes half a minute longer."""

import torch
from torch._dynamo.backends.debugging import aot_eager

from attention import ModelAdapter, PagedKVCache
from attention.paged import api
from attention.paged.batch import build_batch
from specdec.model.fusion import compiled_blocks
from specdec.model.fusion.compiled_blocks import compile_blocks
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.skinny_linear import skinny_linear
from tests.families import build


def test_blocks_share_one_graph_and_compute_the_same(monkeypatch):
    """Hidden states are taken out of the model too."""
    traced = []
    backend = lambda graph, inputs: traced.append(graph) or aot_eager(graph, inputs)
    monkeypatch.setattr(compiled_blocks, "BACKEND", backend)
    # the op then runs the reference, as where there is no interpreter
    monkeypatch.setattr(api, "triton_available", lambda _: False)
    compiled_blocks._compiler.cache_clear()
    model = build("llama")
    adapter = ModelAdapter(model)
    plain = fuse_projections(adapter.twin.model, skinny_linear)
    adapter.run_through(plain, compile_blocks(plain, adapter.layers, adapter.slot))
    tokens = torch.tensor([5, 6, 7, 8])
    found = []
    for compiled in (False, True):
        cache = PagedKVCache.for_layout(adapter.layout, 4, 4)
        sequence = cache.add()
        cache.append([sequence], [4])
        batch = build_batch(cache, [sequence], [4])
        with torch.no_grad():
            found.append(adapter.forward_with_features(tokens, batch.positions, batch, None, compiled=compiled))
    torch.testing.assert_close(found[1], found[0])
    attending = [
        node.meta["example_value"][0].shape
        for graph in traced
        for node in graph.graph.nodes
        if "paged_attention" in str(node.target)
    ]
    assert len(model.model.layers) > 1 == len(attending)
    compiled_blocks._compiler.cache_clear()
