"""Multi-head latent attention over pages of latents: as over all heads' keys and values, and as transformers itself."""

import pytest
import torch
from torch import nn

from attention import ModelAdapter, PagedKVCache, UnsupportedArchitecture
from attention.hf.latent import LATENT as ATTRIBUTE
from attention.hf.latent import LatentHeads, latent_heads, why_expanded
from attention.kv.layout import KeyValueLayer, LatentLayer, LayerLayout
from attention.kv.page_format import PageFormat
from tests.attention.hf.test_adapter import DEPTHS, LEAVES, PARENTS, Pages, alone, assert_same, eager, tokens
from tests.families import LATENT, build

pytestmark = pytest.mark.seam
every_family = pytest.mark.parametrize("family", LATENT)
V3 = LatentLayer(rank=512, rotated=64)


@every_family
def test_logits_are_those_of_expanded_pages_and_of_the_model_alone(family):
    """Ragged prompts in two pieces, then a tree of which a path is accepted, then more."""
    model, prompts = eager(family), [tokens(20), tokens(15)]
    ours, expanded = Pages(model), Pages(model, latents=False)
    assert set(ours.adapter.layout.layers) == {LatentLayer(16, 8)}
    assert set(expanded.adapter.layout.layers) == {KeyValueLayer(4, 20, 10)}
    trees, path, more = [tokens(len(PARENTS), seed=1), tokens(len(PARENTS), seed=2)], [0, 2, 5], [tokens(2), tokens(3)]
    found = []
    for pages in (ours, expanded):
        first = pages.forward([prompts[0][:11], prompts[1][:3]])
        second = pages.forward([prompts[0][11:], prompts[1][3:]])
        of_trees = pages.forward(trees, tree=True)
        pages.cache.commit(pages.sequences, [20, 15], [path, path])
        found.append([torch.cat(row) for row in zip(first, second, of_trees, pages.forward(more), strict=True)])
    for row, expected, prompt, tree, end in zip(*found, prompts, trees, more, strict=True):
        assert_same(row, expected)
        assert_same(row[: len(prompt)], alone(model, prompt))
        for leaf in LEAVES:
            nodes = [leaf]
            while PARENTS[nodes[0]] is not None:
                nodes.insert(0, PARENTS[nodes[0]])
            linear = alone(model, torch.cat([prompt, tree[nodes]]))[len(prompt) :]
            assert len(nodes) == DEPTHS[leaf] + 1
            assert_same(row[len(prompt) :][nodes], linear)
        assert_same(row[-len(end) :], alone(model, torch.cat([prompt, tree[path], end]))[-len(end) :])


def test_a_token_takes_576_numbers_a_layer():
    """Of DeepSeek-V3's shape, where expanded keys and values take 40,960, and no second copy of the values."""
    cache = PagedKVCache.for_layout(LayerLayout((V3,) * 3), 2, 4, dtype=torch.bfloat16)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (cache.key_pages, cache.value_pages)}
    assert sum(held.values()) == 3 * 2 * 4 * 576 * 2 == 2 * cache.stats().bytes_per_page
    assert cache.value_pages.shape == (3, 2, 4, 1, 512)
    expanded = LayerLayout.uniform(num_layers=3, num_kv_heads=128, head_dim=192, value_head_dim=128)
    of_token = [PageFormat(layout, 1, torch.int8).bytes // 3 for layout in (LayerLayout((V3,) * 3), expanded)]
    assert of_token == [576, 40960]


def test_latents_are_not_quantised():
    for make in (
        lambda: PageFormat(LayerLayout((V3,)), 16, kv_dtype="int8"),
        lambda: PagedKVCache.for_layout(LayerLayout((V3,)), 2, 4, kv_dtype="int8"),
    ):
        with pytest.raises(ValueError, match="kv_dtype='int8' is not for layers that keep latents"):
            make()
    for sizes in ((2, 24, 16), (1, 24, None)):
        with pytest.raises(ValueError, match="values in keys are those of one kv head"):
            PagedKVCache(1, 2, 4, *sizes, values_in_keys=True)


def test_the_model_itself_makes_keys_and_values_as_before():
    model = build("deepseek_v3")
    expected = alone(model, tokens(9))
    adapter = ModelAdapter(model)
    ours, theirs = adapter.twin.model.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert isinstance(vars(ours)[ATTRIBUTE], LatentHeads) and not {ATTRIBUTE, "expand_kv"} & vars(theirs).keys()
    assert torch.equal(alone(model, tokens(9)), expected)


def test_weights_are_read_where_they_are_now():
    model, prompt = build("deepseek_v3"), tokens(9)
    pages = Pages(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(0.5)
    (found, _) = pages.forward([prompt, prompt[:3]])
    assert_same(found, alone(model, prompt))


class Adapted(nn.Linear):
    """A linear layer of another kind."""


PROJECTIONS = {
    "a hook": lambda layer: layer.register_forward_hook(lambda module, inputs, out: out * 0.5),
    "another class": lambda layer: setattr(layer, "__class__", Adapted),
    "accelerate's hook": lambda layer: setattr(layer, "_hf_hook", object()),
    "a bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(len(layer.weight)))),
    "a forward of its own": lambda layer: setattr(layer, "forward", layer.forward),
    "8-bit weights": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", PROJECTIONS)
def test_a_projection_that_is_more_than_a_weight_is_called(change):
    """Such layers keep all heads' keys and values."""
    attention = build("deepseek_v3").model.layers[1].self_attn
    assert latent_heads(attention) is not None and why_expanded(attention) is None
    PROJECTIONS[change](attention.kv_b_proj)
    assert latent_heads(attention) is None and "its kv_b_proj" in why_expanded(attention)


def test_layers_of_both_kinds_run_together_and_what_changes_later_is_refused():
    model, prompts = build("deepseek_v3"), [tokens(9), tokens(4)]
    hook = PROJECTIONS["a hook"](model.model.layers[1].self_attn.kv_b_proj)
    with pytest.warns(UserWarning, match=r"DeepseekV3ForCausalLM keeps .* \(1 layers: its kv_b_proj has hooks"):
        pages = Pages(model)
    latent, expanded = LatentLayer(16, 8), KeyValueLayer(4, 20, 10)
    assert pages.adapter.layout.layers == (latent, expanded, latent)
    for ours, prompt in zip(pages.forward(prompts), prompts, strict=True):
        assert_same(ours, alone(model, prompt))
    hook.remove()
    pages.adapter.renew()  # the layer could keep latents now, but pages were made for keys and values
    PROJECTIONS["a hook"](model.model.layers[0].self_attn.kv_b_proj)
    with pytest.raises(UnsupportedArchitecture, match=r"kv_b_proj\) in model.layers.0.self_attn now .* a new runner"):
        pages.adapter.renew()
