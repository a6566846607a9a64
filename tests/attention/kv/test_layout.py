"""The layer layout, and the cache made from one."""

import pytest
import torch

from attention import PagedKVCache
from attention.kv.layout import KeyValueLayer, LatentLayer, LayerLayout, SharedLayer
from attention.kv.page_format import PageFormat
from attention.paged.device_batch import DeviceSequences


def test_a_cache_for_a_layout_is_the_cache_of_those_sizes():
    layout = LayerLayout.uniform(3, num_kv_heads=2, head_dim=8, value_head_dim=5)
    cache = PagedKVCache.for_layout(layout, 4, 16, dtype=torch.float16, kv_dtype="int8")
    assert cache.layout == layout and cache.num_layers == 3
    assert cache.key_pages.shape == (3, 4, 16, 2, 8) and cache.value_pages.shape == (3, 4, 16, 2, 5)
    assert (cache.dtype, cache.kv_dtype) == (torch.float16, "int8")
    assert cache.of_layer(1).layout == LayerLayout.uniform(1, 2, 8, 5)


ONE, OTHER = KeyValueLayer(2, 8, 8), KeyValueLayer(1, 16, 4)
MIXED = LayerLayout((ONE, OTHER, ONE, SharedLayer(1), SharedLayer(0)))
WITH_LATENTS = LayerLayout((*MIXED.layers, LatentLayer(8, 2), LatentLayer(8, 2)))


def test_layers_that_differ_are_parts_of_one_cache():
    cache = PagedKVCache.for_layout(MIXED, 4, 16)
    assert [part.layout.layers for part in cache.parts] == [(ONE, ONE), (OTHER,)]
    assert cache.places == ((0, 0, False), (1, 0, False), (0, 1, False), (1, 0, True), (0, 0, True))
    assert all(part.table is cache.table for part in cache.parts)
    with pytest.raises(ValueError, match="num_kv_heads=2.*num_kv_heads=1"):
        _ = MIXED.common


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_a_page_is_as_large_as_the_parts_say(kv_dtype):
    cache = PagedKVCache.for_layout(MIXED, 4, 16, dtype=torch.float16, kv_dtype=kv_dtype)
    held = [part.key_pages for part in cache.parts] + [part.value_pages for part in cache.parts]
    held += [x for part in cache.parts for x in (part.key_scales, part.value_scales) if x is not None]
    form = PageFormat(MIXED, 16, torch.float16, kv_dtype)
    assert 4 * form.bytes == sum(x.nbytes for x in held) and cache.stats().bytes_per_page == form.bytes


def numbered(cache):
    """Fill every number that a slot of `cache` holds with that of the slot, plus 100 for every layer of a part."""
    for part in cache.parts:
        for pages in (part.key_pages, part.value_pages, part.key_scales, part.value_scales):
            if pages is not None:
                slots = torch.arange(cache.num_pages * cache.page_size).view(1, cache.num_pages, cache.page_size)
                number = slots + 100 * torch.arange(part.num_layers)[:, None, None]
                pages.copy_(number.view(*number.shape, *[1] * (pages.ndim - 3)).expand_as(pages))


def found(cache, sequence):
    """Which slot's numbers each position holds, the same in every layer of every part."""
    slots, seen = torch.tensor(cache.slots(sequence, range(cache.length(sequence)))), []
    for part in cache.parts:
        for rows in (part.key_slots, part.value_slots, part.key_scale_slots, part.value_scale_slots):
            for layer, of_layer in enumerate(rows):
                numbers = of_layer[slots].float().flatten(1) - 100 * layer
                assert bool((numbers == numbers[:, :1]).all())
                seen.append(numbers[:, 0].int().tolist())
    assert all(each == seen[0] for each in seen)
    return seen[0]


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
def test_forks_and_accepted_paths_move_in_every_part(kv_dtype):
    cache = PagedKVCache.for_layout(WITH_LATENTS, 8, 4)
    if kv_dtype is not None:  # numbers that 8 bits hold
        cache = PagedKVCache.for_layout(LayerLayout(MIXED.layers[:2]), 2, 4, kv_dtype=kv_dtype)
    first = cache.add()
    cache.append([first], [7])
    numbered(cache)
    before = found(cache, first)
    if kv_dtype is None:
        twin = cache.fork(first)
        cache.append([twin], [1])
        assert cache.pages(twin)[1] != cache.pages(first)[1] and found(cache, twin)[:7] == before
    cache.commit([first], [2], [[0, 2, 4]])
    assert found(cache, first) == [before[i] for i in (0, 1, 2, 4, 6)]


def test_rows_whose_lengths_are_on_the_device_commit_in_every_part():
    cache = PagedKVCache.for_layout(WITH_LATENTS, 4, 4)
    sequence = cache.add()
    cache.append([sequence], [9])
    numbered(cache)
    before, rows = found(cache, sequence), DeviceSequences(cache, 12, torch.zeros(1, dtype=torch.bool))
    rows.load([sequence], [9])
    rows.commit(torch.tensor([3]), torch.tensor([[2, 4, 5]]), torch.tensor([2]))
    assert found(cache, sequence)[:6] == [before[i] for i in (0, 1, 2, 3, 5, 7)]


@pytest.mark.parametrize("owner", [-1, 1, 2, 3])
def test_a_layer_shares_what_an_earlier_one_keeps(owner):
    with pytest.raises(ValueError, match=f"layer 2 must share .* got owner {owner}"):
        LayerLayout((ONE, SharedLayer(0), SharedLayer(owner), ONE))


@pytest.mark.parametrize("size", ["num_layers", "num_kv_heads", "head_dim", "value_head_dim"])
def test_sizes_below_one_are_refused_by_name(size):
    sizes = dict(num_layers=1, num_kv_heads=1, head_dim=1, value_head_dim=1) | {size: -1}
    with pytest.raises(ValueError, match=f"{size} .*-1"):
        LayerLayout.uniform(**sizes)


def test_a_layout_has_a_layer():
    with pytest.raises(ValueError, match="at least one layer"):
        LayerLayout(())
