"""Ancestor bits against brute force, and the index arithmetic of `build_batch`."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention import PagedKVCache, paged_attention
from attention.paged.batch import StaticBatch, ancestor_bits, build_batch
from tests.attention.devices import DEVICE

TREES = st.integers(1, 130).flatmap(lambda nodes: st.lists(st.integers(0, 128), min_size=nodes - 1, max_size=nodes - 1))
PARENTS, DEPTHS = [None, 0, 0, 1], [0, 1, 1, 2]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(TREES)
@example(list(range(129)))  # a chain: parent of node n is n - 1
@example([0] * 129)  # a star
@example([0] * 63)
@example(list(range(64)))
def test_ancestor_bits_equal_brute_force(draws):
    parents = [None, *(draw % node for node, draw in enumerate(draws, 1))]
    bits = ancestor_bits(parents)
    assert len(bits) == len(parents)
    for node, words in enumerate(bits):
        ancestors, above = {node}, parents[node]
        while above is not None:
            ancestors.add(above)
            above = parents[above]
        assert len(words) == (len(parents) + 63) // 64 and all(-(2**63) <= word < 2**63 for word in words)
        assert {64 * w + b for w, word in enumerate(words) for b in range(64) if word >> b & 1} == ancestors


def cache_with(*lengths: int, page_size: int = 4, **options) -> tuple[PagedKVCache, list[int]]:
    """Sequences of these lengths, grown in turns so that their pages interleave."""
    cache = PagedKVCache(1, 32, page_size, num_kv_heads=1, **{"head_dim": 2} | options)
    sequences = [cache.add() for _ in lengths]
    while any(cache.length(s) < n for s, n in zip(sequences, lengths, strict=True)):
        cache.append(sequences, [min(page_size, n - cache.length(s)) for s, n in zip(sequences, lengths, strict=True)])
    return cache, sequences


def test_ragged_causal_batch():
    cache, sequences = cache_with(9, 3, 5)
    batch = build_batch(cache, sequences, [2, 3, 1])
    assert (
        batch.num_sequences == 3
        and batch.kv_lengths.tolist() == [9, 3, 5]
        and batch.cu_seqlens_q.tolist() == [0, 2, 5, 6]
    )
    assert batch.positions.tolist() == [7, 8, 0, 1, 2, 4]
    a, b, c = sequences
    assert batch.slots.tolist() == cache.slots(a, [7, 8]) + cache.slots(b, [0, 1, 2]) + cache.slots(c, [4])
    assert (batch.max_query_length, batch.max_kv_length, batch.uniform) == (3, 9, False)
    assert (
        batch.tree_bits is None and batch.cu_tree_sizes is None and batch.tree_positions is None and batch.run is None
    )


def test_block_tables_are_the_pages_padded_with_zero():
    cache, (a, b) = cache_with(9, 3)
    table = build_batch(cache, [b, a], [1, 1]).block_tables.tolist()
    assert table == [[*cache.pages(b), 0, 0], list(cache.pages(a))]


def test_tree_tail_sits_at_prefix_plus_depth():
    cache, sequences = cache_with(10, 6)
    bits = ancestor_bits(PARENTS)
    batch = build_batch(cache, sequences, [6, 4], [(DEPTHS, bits)] * 2)
    assert batch.positions.tolist() == [4, 5, 6, 7, 7, 8] + [2, 3, 3, 4]
    assert batch.slots.tolist() == cache.slots(sequences[0], range(4, 10)) + cache.slots(sequences[1], range(2, 6))
    assert batch.cu_seqlens_q.tolist() == [0, 6, 10] and batch.cu_tree_sizes.tolist() == [0, 4, 8]
    assert batch.tree_bits.tolist() == [[0], [0], *bits, *bits]


def test_tree_of_several_words_keeps_all_its_words():
    cache, sequences = cache_with(80)
    bits = ancestor_bits([None, *range(69)])
    batch = build_batch(cache, sequences, [71], [(range(70), bits)])
    assert batch.tree_bits.tolist() == [[0, 0], *bits] and batch.positions.tolist() == list(range(9, 80))


def test_every_sequence_has_its_own_tree_or_none():
    cache, sequences = cache_with(80, 6, 5)
    large, small = ancestor_bits([None, *range(69)]), ancestor_bits(PARENTS)
    batch = build_batch(cache, sequences, [71, 2, 4], [(range(70), large), None, (DEPTHS, small)])
    assert batch.cu_tree_sizes.tolist() == [0, 70, 70, 74]
    assert batch.tree_bits.tolist() == [[0, 0], *large, [0, 0], [0, 0], *([word, 0] for (word,) in small)]
    assert batch.positions.tolist() == [*range(9, 80), 4, 5, 1, 2, 2, 3]


def test_the_first_nodes_of_a_tree_may_be_in_the_cache():
    cache, sequences = cache_with(10, 6)
    bits = ancestor_bits(PARENTS)
    batch = build_batch(cache, sequences, [2, 5], [(DEPTHS, bits)] * 2)
    assert batch.positions.tolist() == [7, 8] + [1, 2, 3, 3, 4]
    assert batch.tree_positions.tolist() == [6, 7, 7, 8] + [2, 3, 3, 4]
    assert batch.tree_bits.tolist() == [*bits[2:], [0], *bits]


@pytest.mark.parametrize("queries", [(4, 4), (2, 2), (6, 4), (6, 1)])
def test_trees_that_only_the_device_knows_give_the_same_batch(queries):
    cache, sequences = cache_with(10, 6)
    other, depths = [None, 0, 1, 2], [0, 1, 2, 3]
    known = build_batch(cache, sequences, queries, [(DEPTHS, ancestor_bits(PARENTS)), (depths, ancestor_bits(other))])
    given = build_batch(
        cache,
        sequences,
        queries,
        (torch.tensor([DEPTHS, depths]), torch.tensor([ancestor_bits(PARENTS), ancestor_bits(other)])),
    )
    for name in ("positions", "slots", "tree_bits", "cu_tree_sizes", "tree_positions", "kv_lengths", "cu_seqlens_q"):
        assert torch.equal(getattr(known, name), getattr(given, name)), name


def test_trees_of_the_host_and_of_the_device_beside_each_other():
    """And sequences without one, in a forward of which some trees' first nodes are in the cache."""
    cache, sequences = cache_with(10, 6, 5, 9, 80, 7)
    long = [None, *range(69)]
    others = [(range(70), ancestor_bits(long)), ([0, 1], ancestor_bits([None, 0]))]
    trees = [(DEPTHS, ancestor_bits(PARENTS)), None, *[(DEPTHS, ancestor_bits(PARENTS))] * 2, *others]
    on_device = lambda tree: None if tree is None else (torch.tensor(tree[0]), torch.tensor(tree[1]))
    queries = [4, 2, 2, 6, 70, 7]
    known = build_batch(cache, sequences, queries, trees)
    for places in ((0, 2, 3), (2, 3), (4, 5), range(6)):
        given = [on_device(tree) if i in places else tree for i, tree in enumerate(trees)]
        made = build_batch(cache, sequences, queries, given)
        for name in ("positions", "slots", "tree_bits", "cu_tree_sizes", "tree_positions", "kv_lengths"):
            assert getattr(known, name).equal(getattr(made, name)), (places, name)


def test_one_tree_or_none_for_every_sequence():
    cache, sequences = cache_with(8, 3)
    with pytest.raises(ValueError, match="2 sequences and 1 trees"):
        build_batch(cache, sequences, [4, 1], [(DEPTHS, ancestor_bits(PARENTS))])


@pytest.mark.parametrize(
    ("lengths", "queries", "uniform"),
    [((5, 5), (2, 2), True), ((5, 5), (2, 1), False), ((5, 6), (2, 2), False), ((7,), (3,), True)],
)
def test_uniform_means_equal_queries_and_equal_keys(lengths, queries, uniform):
    cache, sequences = cache_with(*lengths)
    assert build_batch(cache, sequences, queries).uniform is uniform


def test_run_is_the_slots_of_one_sequence_whose_pages_lie_in_a_row():
    cache, (only,) = cache_with(9)
    assert list(range(100))[build_batch(cache, [only], [1]).run] == cache.slots(only, range(9))
    cache, (_, interleaved) = cache_with(9, 9)
    assert build_batch(cache, [interleaved], [1]).run is None


@pytest.mark.parametrize(
    ("queries", "tree"),
    [((0, 1), False), ((-1, 1), False), ((1, 4), False), ((9, 5), False), ((9, 3), True), ((3, 3), True)],
)
def test_queries_that_do_not_fit_are_refused_by_name(queries, tree):
    cache, sequences = cache_with(8, 3)
    bad = 0 if not 1 <= queries[0] <= 8 else 1
    with pytest.raises(ValueError, match=rf"sequence {sequences[bad]} of {(8, 3)[bad]} tokens.* {queries[bad]} query"):
        build_batch(cache, sequences, queries, [(DEPTHS, ancestor_bits(PARENTS)) if tree else None] * 2)


def test_one_query_length_per_sequence():
    cache, sequences = cache_with(8, 3)
    with pytest.raises(ValueError):
        build_batch(cache, sequences, [1])


def test_derived_computes_once_for_a_name():
    cache, sequences = cache_with(4)
    batch, calls = build_batch(cache, sequences, [1]), []
    for _ in range(3):
        assert batch.derived("x", lambda b: calls.append(b) or len(calls)) == 1
    assert calls == [batch]


@pytest.mark.parametrize("trees", [None, [(DEPTHS, ancestor_bits(PARENTS))] * 2])
def test_sequences_that_a_static_batch_lacks_have_no_tokens(trees):
    """Attention over the tokens of the others is what it is without them, and no token is anybody else's."""
    cache, sequences = cache_with(9, 14, page_size=16, head_dim=16, device=DEVICE)
    for pages in (cache.key_pages, cache.value_pages):
        pages.copy_(torch.randn(pages.shape, generator=torch.Generator().manual_seed(1)))
    static = StaticBatch(cache, 4, num_tokens=32, num_pages=5, words=1 if trees else 0, num_nodes=16 if trees else 0)
    static.load(sequences, [5, 7], trees)
    expected, batch = build_batch(cache, sequences, [5, 7], trees), static.batch
    assert batch.kv_lengths.tolist() == [9, 14, 0, 0] and batch.cu_seqlens_q.tolist() == [0, 5, 12, 12, 12]
    assert trees is None or batch.cu_tree_sizes.tolist() == [0, 4, 8, 8, 8]
    heads, dim = cache.key_pages.shape[3:]
    query = torch.randn(32, heads, dim, generator=torch.Generator().manual_seed(2)).to(cache.device, cache.dtype)
    whole, part = (paged_attention(q, 0, b, 0.3) for q, b in ((query, batch), (query[:12], expected)))
    torch.testing.assert_close(whole[:12], part)


@pytest.mark.parametrize("trees", [None, [(DEPTHS, ancestor_bits(PARENTS))] * 2])
def test_a_static_batch_describes_what_a_new_one_would(trees):
    """One after the other, each in the same tensors; what is padding is stored nowhere."""
    cache, sequences = cache_with(9, 14, 6, 11)
    static = StaticBatch(cache, 2, num_tokens=16, num_pages=5, words=1 if trees else 0, num_nodes=8 if trees else 0)
    addresses = static.batch.slots.data_ptr(), static.batch.block_tables.data_ptr()
    assert (static.batch.slots == -1).all() and not static.batch.cu_seqlens_q.any(), (
        "before it is loaded nothing is stored"
    )
    for chosen, counts in ((sequences[:2], [5, 7]), (sequences[2:], [6, 4]), (sequences[1:3], [14, 2])):
        static.load(chosen, counts, trees)
        expected, total = build_batch(cache, chosen, counts, trees), sum(counts)
        assert static.batch.block_tables[:, : expected.block_tables.shape[1]].equal(expected.block_tables)
        for name in ("kv_lengths", "cu_seqlens_q", "cu_tree_sizes", "tree_positions"):
            mine, theirs = getattr(static.batch, name), getattr(expected, name)
            assert mine is theirs is None or mine.equal(theirs)
        for name in ("positions", "slots", "tree_bits"):
            mine, theirs = getattr(static.batch, name), getattr(expected, name)
            assert mine is theirs is None or mine[:total].equal(theirs)
        assert (static.batch.slots[total:] == -1).all()
    assert addresses == (static.batch.slots.data_ptr(), static.batch.block_tables.data_ptr())
