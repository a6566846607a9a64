"""The layer layout, and the cache made from one."""

import pytest
import torch

from attention import PagedKVCache
from attention.kv.layout import KeyValueLayer, LayerLayout


def test_a_cache_for_a_layout_is_the_cache_of_those_sizes():
    layout = LayerLayout.uniform(3, num_kv_heads=2, head_dim=8, value_head_dim=5)
    cache = PagedKVCache.for_layout(layout, 4, 16, dtype=torch.float16, kv_dtype="int8")
    assert cache.layout == layout and cache.num_layers == 3
    assert cache.key_pages.shape == (3, 4, 16, 2, 8) and cache.value_pages.shape == (3, 4, 16, 2, 5)
    assert (cache.dtype, cache.kv_dtype) == (torch.float16, "int8")
    assert cache.of_layer(1).layout == LayerLayout.uniform(1, 2, 8, 5)


def test_layers_that_differ_are_refused():
    mixed = LayerLayout((KeyValueLayer(2, 8, 8), KeyValueLayer(1, 8, 8)))
    with pytest.raises(ValueError, match="num_kv_heads=2.*num_kv_heads=1"):
        PagedKVCache.for_layout(mixed, 4, 16)


@pytest.mark.parametrize("size", ["num_layers", "num_kv_heads", "head_dim", "value_head_dim"])
def test_sizes_below_one_are_refused_by_name(size):
    sizes = dict(num_layers=1, num_kv_heads=1, head_dim=1, value_head_dim=1) | {size: -1}
    with pytest.raises(ValueError, match=f"{size} .*-1"):
        LayerLayout.uniform(**sizes)


def test_a_layout_has_a_layer():
    with pytest.raises(ValueError, match="at least one layer"):
        LayerLayout(())
