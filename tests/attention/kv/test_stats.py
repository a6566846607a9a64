"""How full a cache says it is."""

import pytest
import torch

from attention import PagedKVCache
from attention.kv.prefix import PrefixIndex, block_keys
from attention.kv.stats import CacheStats


def counts(cache):
    stats = cache.stats()
    assert stats.total == cache.num_pages and stats.free + stats.reusable == cache.free_pages
    return stats.free, stats.reusable, stats.owned, stats.shared, stats.wasted_tail


def test_pages_are_counted_once_and_by_their_state():
    cache = PagedKVCache(2, 10, 4, num_kv_heads=1, head_dim=8, dtype=torch.bfloat16)
    assert counts(cache) == (10, 0, 0, 0, 0)
    first = cache.add()
    cache.append([first], [10])
    assert counts(cache) == (7, 0, 3, 0, 2)
    second = cache.fork(first)
    assert counts(cache) == (7, 0, 3, 3, 2)
    cache.truncate(second, 9)  # the page they share is used by the longer one
    assert counts(cache) == (7, 0, 3, 3, 2)
    cache.truncate(first, 5)
    assert counts(cache) == (7, 0, 3, 2, 3)
    cache.append([second], [1])
    assert counts(cache) == (7, 0, 3, 2, 2)
    PrefixIndex([cache.table]).register([second], block_keys(range(8), 4))
    cache.free(second)
    assert counts(cache) == (8, 0, 2, 0, 3)
    cache.free(first)
    assert counts(cache) == (8, 2, 0, 0, 0)
    assert cache.stats().bytes_per_page == 2 * 4 * 2 * 8 * 2 and cache.stats().bytes_in_use == 2 * 256


def test_pages_given_back_at_the_front_are_not_owned():
    cache = PagedKVCache(1, 10, 4, num_kv_heads=1, head_dim=8)
    first = cache.add()
    cache.append([first], [18])
    PrefixIndex([cache.table]).register([first], block_keys(range(8), 4))
    cache.free_front(first, committed=18, window=4)
    assert counts(cache) == (6, 2, 2, 0, 2), "of five pages two are blocks and one holds nothing"
    cache.fork(first)
    assert counts(cache) == (6, 2, 2, 2, 2)


def test_counts_that_do_not_add_up_are_refused():
    fields = dict(total=8, free=3, reusable=1, owned=4, shared=4, wasted_tail=0, bytes_per_page=1)
    CacheStats(**fields)
    for wrong in (dict(free=4), dict(reusable=0), dict(shared=5)):
        with pytest.raises(ValueError, match="add up"):
            CacheStats(**fields | wrong)
