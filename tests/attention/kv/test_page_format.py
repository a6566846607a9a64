"""Bytes of a page, against the memory of caches; pages of a budget."""

import pytest
import torch

from attention import PagedKVCache
from attention.kv.layout import KeyValueLayer, LayerLayout
from attention.kv.page_format import PageFormat, pages_within


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_memory(dtype, kv_dtype):
    cache = PagedKVCache(3, 5, 4, num_kv_heads=2, head_dim=8, value_head_dim=6, dtype=dtype, kv_dtype=kv_dtype)
    held = (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales)
    assert cache.format == PageFormat(cache.layout, 4, dtype, kv_dtype)
    assert cache.format.bytes * 5 == sum(t.nbytes for t in held if t is not None)
    assert cache.of_layer(1).format.bytes * 3 == cache.format.bytes


def test_layers_may_differ():
    layers = KeyValueLayer(2, 8, 6), KeyValueLayer(1, 4, 4)
    alone = [PageFormat(LayerLayout((layer,)), 16, torch.bfloat16, "int8").bytes for layer in layers]
    assert PageFormat(LayerLayout(layers), 16, torch.bfloat16, "int8").bytes == sum(alone)
    assert alone[1] == 16 * (4 + 4 + 2 * 4)


def test_a_budget_is_used_up_and_not_exceeded():
    target = PageFormat(LayerLayout.uniform(2, 2, 8), 4, torch.bfloat16)  # 512 bytes
    draft = PageFormat(LayerLayout.uniform(1, 1, 8), 4, torch.float32)  # 256 bytes
    assert (target.bytes, draft.bytes) == (512, 256)
    for budget, pages in ((768, 1), (768 * 7 - 1, 6), (768 * 7, 7)):
        assert pages_within(budget, target, draft) == pages
    assert pages_within(1024, target) == 2


def test_a_budget_below_one_page_names_the_numbers():
    target = PageFormat(LayerLayout.uniform(2, 2, 8), 4, torch.bfloat16)
    with pytest.raises(ValueError, match=r"1024 bytes \[512, 512\], got 1023"):
        pages_within(1023, target, target)
    with pytest.raises(ValueError, match="0 formats"):
        pages_within(1024)


def test_bad_formats_are_named():
    layout = LayerLayout.uniform(1, 1, 1)
    with pytest.raises(ValueError, match="page_size .* 0"):
        PageFormat(layout, 0)
    with pytest.raises(ValueError, match="'int4'"):
        PageFormat(layout, 1, kv_dtype="int4")
