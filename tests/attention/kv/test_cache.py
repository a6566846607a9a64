"""The paged cache against a model in plain Python: each sequence is the list of its tokens."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from attention import OutOfPages, PagedKVCache

LAYERS, PAGES, PAGE_SIZE = 2, 9, 3


def small_cache(num_pages: int = PAGES, page_size: int = PAGE_SIZE) -> PagedKVCache:
    cache = PagedKVCache(LAYERS, num_pages, page_size, num_kv_heads=1, head_dim=2, value_head_dim=1)
    cache.key_pages.fill_(float("nan"))
    cache.value_pages.fill_(float("nan"))
    return cache


def write(cache: PagedKVCache, sequence: int, start: int, tokens: Sequence[int]) -> None:
    """Store `tokens` at the positions from `start`: keys and values of every layer differ by sign and by layer."""
    slots = torch.tensor(cache.slots(sequence, range(start, start + len(tokens))), dtype=torch.int64)
    for layer in range(LAYERS):
        content = torch.tensor(tokens, dtype=torch.float32)[:, None, None] * LAYERS + layer
        cache.key_slots[layer][slots] = content
        cache.value_slots[layer][slots] = -content


def grow(cache: PagedKVCache, sequence: int, tokens: Sequence[int]) -> None:
    cache.append([sequence], [len(tokens)])
    write(cache, sequence, cache.length(sequence) - len(tokens), tokens)


def read(cache: PagedKVCache, sequence: int) -> list[int]:
    """The tokens of `sequence`, read page by page through its block table; all layers must agree."""
    length, table = cache.length(sequence), torch.tensor(cache.pages(sequence), dtype=torch.int64)
    keys = [cache.key_pages[layer, table].flatten(0, 1)[:length, 0] for layer in range(LAYERS)]
    values = [cache.value_pages[layer, table].flatten(0, 1)[:length, 0] for layer in range(LAYERS)]
    tokens = [round(key) // LAYERS for key in keys[0][:, 0].tolist()]
    for layer in range(LAYERS):
        expected = torch.tensor(tokens, dtype=torch.float32)[:, None] * LAYERS + layer
        assert torch.equal(keys[layer], expected.expand(-1, 2)) and torch.equal(values[layer], -expected)
    return tokens


def state(cache: PagedKVCache) -> tuple:
    """Everything a caller can see: contents, block tables, free pages."""
    return [(s, cache.length(s), cache.pages(s), read(cache, s)) for s in cache.sequences], cache.free_pages


def held(cache: PagedKVCache) -> dict[int, int]:
    """How many sequences hold each page."""
    tables = [page for s in cache.sequences for page in cache.pages(s)]
    return {page: tables.count(page) for page in tables}


class CacheMachine(RuleBasedStateMachine):
    """Random moves; after every one, each live sequence reads back exactly its model's tokens and no page is lost."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.cache = small_cache()
        self.tokens: dict[int, list[int]] = {}
        self.next_token = 1

    @rule(target=sequences)
    def add(self):
        sequence = self.cache.add()
        assert sequence not in self.tokens
        self.tokens[sequence] = []
        return sequence

    @rule(
        rows=st.lists(st.tuples(sequences, st.integers(0, 2 * PAGE_SIZE + 1)), max_size=3, unique_by=lambda row: row[0])
    )
    def append(self, rows):
        chosen, counts = [s for s, _ in rows], [c for _, c in rows]
        owners = held(self.cache)
        needed = 0
        for sequence, count in rows:
            length = len(self.tokens[sequence])
            copies = count > 0 and length % PAGE_SIZE > 0 and owners[self.cache.pages(sequence)[-1]] > 1
            needed += copies + self.cache.pages_for(length + count) - self.cache.pages_for(length)
        before, free = state(self.cache), self.cache.free_pages
        try:
            self.cache.append(chosen, counts)
        except OutOfPages:
            assert needed > free and state(self.cache) == before
            return
        for sequence, count in rows:
            new = list(range(self.next_token, self.next_token + count))
            write(self.cache, sequence, len(self.tokens[sequence]), new)
            self.tokens[sequence] += new
            self.next_token += count

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence, data):
        length = data.draw(st.integers(0, len(self.tokens[sequence])))
        self.cache.truncate(sequence, length)
        del self.tokens[sequence][length:]

    @rule(chosen=st.lists(sequences, max_size=2, unique=True), data=st.data())
    def commit(self, chosen, data):
        starts, paths = [], []
        for sequence in chosen:
            length = len(self.tokens[sequence])
            starts.append(data.draw(st.integers(0, length)))
            offsets = st.sets(st.integers(0, length - starts[-1] - 1)) if length > starts[-1] else st.just(set())
            paths.append(sorted(data.draw(offsets)))
        try:
            self.cache.commit(chosen, starts, paths)
        except OutOfPages:  # a page shared with a fork had to be copied
            assert self._writes_to_a_shared_page(chosen, starts, paths)
            return
        for sequence, start, path in zip(chosen, starts, paths, strict=True):
            tokens = self.tokens[sequence]
            tokens[start:] = [tokens[start + offset] for offset in path]

    def _writes_to_a_shared_page(self, chosen, starts, paths) -> bool:
        owners = held(self.cache)
        moves = [
            (s, start + i)
            for s, start, path in zip(chosen, starts, paths, strict=True)
            for i, offset in enumerate(path)
            if i != offset
        ]
        return any(owners[self.cache.pages(s)[position // PAGE_SIZE]] > 1 for s, position in moves)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        twin, free = self.cache.fork(sequence), self.cache.free_pages
        assert twin not in self.tokens and self.cache.free_pages == free
        self.tokens[twin] = list(self.tokens[sequence])
        return twin

    @rule(target=sequences, sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.tokens[sequence]
        return multiple()

    @invariant()
    def every_sequence_reads_back_its_tokens(self):
        assert {s: read(self.cache, s) for s in self.cache.sequences} == self.tokens

    @invariant()
    def no_page_is_lost(self):
        assert self.cache.free_pages + len(held(self.cache)) == PAGES
        for sequence, tokens in self.tokens.items():
            pages = self.cache.pages(sequence)
            assert len(set(pages)) == len(pages) == self.cache.pages_for(len(tokens)) and self.cache.length(
                sequence
            ) == len(tokens)


CacheMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestCacheMachine = CacheMachine.TestCase


def two_sequences() -> tuple[PagedKVCache, int, int]:
    cache = small_cache()
    first, second = cache.add(), cache.add()
    grow(cache, first, range(1, 8))
    grow(cache, second, range(20, 25))
    return cache, first, second


def test_out_of_pages_names_the_numbers_and_changes_nothing():
    cache, first, second = two_sequences()  # 3 + 2 of 9 pages of 3
    before = state(cache)
    with pytest.raises(OutOfPages) as caught:
        cache.append([first, second], [3, 14])  # 1 + 5 more pages
    message = str(caught.value)
    assert all(part in message for part in ("6 pages of 3 tokens", "17 tokens", "4 of 9 are free"))
    assert state(cache) == before


def test_the_last_free_page_can_be_used():
    cache, first, second = two_sequences()
    cache.append([first, second], [2 + 3 * 2, 1 + 3 * 2])
    assert cache.free_pages == 0
    cache.append([first, second], [0, 0])
    with pytest.raises(OutOfPages, match="0 of 9"):
        cache.append([first], [1])


BAD_CALLS = {
    "length of unknown": (lambda c, a, b: c.length(77), KeyError, "77"),
    "pages of unknown": (lambda c, a, b: c.pages(77), KeyError, "77"),
    "slots of unknown": (lambda c, a, b: c.slots(77, [0]), KeyError, "77"),
    "append to unknown": (lambda c, a, b: c.append([a, 77], [1, 1]), KeyError, "77"),
    "truncate unknown": (lambda c, a, b: c.truncate(77, 0), KeyError, "77"),
    "fork unknown": (lambda c, a, b: c.fork(77), KeyError, "77"),
    "free unknown": (lambda c, a, b: c.free(77), KeyError, "77"),
    "commit unknown": (lambda c, a, b: c.commit([a, 77], [0, 0], [[1], [1]]), KeyError, "77"),
    "append twice to one": (
        lambda c, a, b: c.append([a, b, a], [1, 1, 1]),
        ValueError,
        r"\[\d+, \d+, \d+\] and \[1, 1, 1\]",
    ),
    "append a negative count": (lambda c, a, b: c.append([a, b], [1, -3]), ValueError, "-3"),
    "append one less": (lambda c, a, b: c.append([a, b], [1, -1]), ValueError, "-1"),
    "append fewer counts": (lambda c, a, b: c.append([a, b], [4]), ValueError, r"\[4\]"),
    "truncate beyond length": (lambda c, a, b: c.truncate(a, 8), ValueError, "7 tokens.* 8"),
    "truncate below zero": (lambda c, a, b: c.truncate(a, -1), ValueError, "-1"),
    "slot behind the end": (lambda c, a, b: c.slots(a, [3, 7]), ValueError, "7 tokens holds no positions 3 to 7"),
    "slot far behind the end": (lambda c, a, b: c.slots(a, [3, 8]), ValueError, "7 tokens holds no positions 3 to 8"),
    "slot before the start": (lambda c, a, b: c.slots(a, [2, -1]), ValueError, "7 tokens holds no positions -1 to 2"),
    "path repeats": (lambda c, a, b: c.commit([b, a], [0, 1], [[1], [2, 2]]), ValueError, r"\[2, 2\]"),
    "path decreases": (lambda c, a, b: c.commit([b, a], [0, 1], [[1], [0, 3, 2]]), ValueError, r"\[0, 3, 2\]"),
    "path leaves the end": (
        lambda c, a, b: c.commit([b, a], [0, 1], [[1], [1, 6]]),
        ValueError,
        r"\[1, 6\].* 7 tokens",
    ),
    "path goes far": (lambda c, a, b: c.commit([b, a], [0, 1], [[1], [1, 7]]), ValueError, r"\[1, 7\].* 7 tokens"),
    "path before the start": (lambda c, a, b: c.commit([b, a], [0, 1], [[1], [-1, 2]]), ValueError, r"\[-1, 2\]"),
    "negative start": (lambda c, a, b: c.commit([b, a], [0, -2], [[1], [3]]), ValueError, "-2"),
    "start one before the first": (lambda c, a, b: c.commit([b, a], [0, -1], [[1], [3]]), ValueError, "from -1"),
    "fewer paths": (lambda c, a, b: c.commit([b, a], [0, 0], [[1]]), ValueError, None),
    "more paths": (lambda c, a, b: c.commit([b], [0], [[1], [1]]), ValueError, None),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_named_and_change_nothing(name):
    call, error, message = BAD_CALLS[name]
    cache, first, second = two_sequences()
    before = state(cache)
    with pytest.raises(error, match=message):
        call(cache, first, second)
    assert state(cache) == before


@pytest.mark.parametrize(
    "call",
    [lambda c, a, b: c.commit([a, b], [0, 9], [[1], []]), lambda c, a, b: c.commit([a, a], [0, 0], [[1, 2], [1]])],
    ids=["start behind the end", "one sequence twice"],
)
def test_commit_checks_all_rows_before_it_moves_any(call):
    cache, first, second = two_sequences()
    before = state(cache)
    with pytest.raises(ValueError):
        call(cache, first, second)
    assert state(cache) == before


@pytest.mark.parametrize("size", ["num_layers", "num_pages", "page_size", "num_kv_heads", "head_dim"])
def test_sizes_below_one_are_refused_by_name(size):
    sizes = dict(num_layers=1, num_pages=1, page_size=1, num_kv_heads=1, head_dim=1) | {size: 0}
    with pytest.raises(ValueError, match=f"{size}.*0"):
        PagedKVCache(**sizes)


def test_sequences_are_extended_to_the_end_of_a_page():
    cache = small_cache()
    first, second, third = cache.add(), cache.add(), cache.add()
    cache.append([first, second], [4, 6])
    tables = [cache.pages(sequence) for sequence in (first, second)]
    cache.extend_to([first, second, third], [5, 6, 0])
    assert [cache.length(sequence) for sequence in (first, second, third)] == [6, 6, 0]
    assert [cache.pages(sequence) for sequence in (first, second)] == tables
    with pytest.raises(OutOfPages):
        cache.extend_to([first, third], [7, 5 * PAGE_SIZE])
    assert [cache.length(sequence) for sequence in (first, second, third)] == [6, 6, 0] and cache.free_pages == 5
    cache.extend_to([first, third], [7, 4 * PAGE_SIZE - 2])
    assert [cache.length(sequence) for sequence in (first, third)] == [9, 12] and cache.free_pages == 0


def test_commit_keeps_the_path_of_every_sequence_and_frees_the_rest():
    cache, first, second = two_sequences()
    cache.commit([first, second], [2, 0], [[0, 2, 4], []])
    assert read(cache, first) == [1, 2, 3, 5, 7] and read(cache, second) == []
    assert cache.free_pages == PAGES - 2


def test_fork_shares_pages_until_one_side_grows():
    cache, first, _ = two_sequences()
    free, twin = cache.free_pages, cache.fork(first)
    assert cache.free_pages == free and cache.pages(twin) == cache.pages(first)
    grow(cache, twin, [90])
    assert cache.pages(twin)[:2] == cache.pages(first)[:2] and cache.pages(twin)[2] != cache.pages(first)[2]
    grow(cache, first, [91])
    assert read(cache, twin) == [*range(1, 8), 90] and read(cache, first) == [*range(1, 8), 91]


def test_commit_does_not_reach_a_fork():
    """A path committed over tokens that a fork shares leaves the fork's tokens as they were."""
    cache, first, _ = two_sequences()
    twin = cache.fork(first)
    cache.commit([first], [0], [[2, 4]])
    assert read(cache, first) == [3, 5]
    assert read(cache, twin) == list(range(1, 8))


@pytest.mark.parametrize("path", [[1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 5, 6], [0, 2, 3, 4, 6]])
def test_commit_copies_every_shared_page_that_it_writes_to(path):
    """What moves lands in the first page, the second, or in both; every one of them is the fork's too."""
    cache, first, _ = two_sequences()
    twin, tokens = cache.fork(first), list(range(1, 8))
    cache.commit([first], [0], [path])
    assert read(cache, first) == [tokens[place] for place in path]
    assert read(cache, twin) == tokens
    written = {place // PAGE_SIZE for place, source in enumerate(path) if place != source}
    kept = range(cache.pages_for(len(path)))
    assert {i for i in kept if cache.pages(first)[i] != cache.pages(twin)[i]} == written, (
        "a page that nothing moves to stays shared"
    )


def test_the_moves_of_a_commit_come_in_one_segment_for_each_sequence(monkeypatch):
    """What a kernel that moves the segments side by side is told; the reference moves all at once and asks for no
    borders.
    """
    cache, first, second = two_sequences()
    told, move = [], cache.move

    def spy(sources, targets, cu_moves, rows):
        told.append((cu_moves.tolist(), rows))
        move(sources, targets, cu_moves, rows)

    monkeypatch.setattr(cache, "move", spy)
    cache.commit([first, second], [1, 0], [[0, 2, 5], [3]])
    assert (
        told == [([0, 2, 3], PAGES * PAGE_SIZE)] and read(cache, first) == [1, 2, 4, 7] and read(cache, second) == [23]
    )


def test_pages_made_in_inference_mode_can_be_written_outside_it():
    with torch.inference_mode():
        cache = PagedKVCache(1, 2, 2, num_kv_heads=1, head_dim=2, kv_dtype="int8")
    assert not any(
        held.is_inference()
        for held in (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_slots[0], cache.key_heads[0])
    )


def test_a_shared_page_that_cannot_be_copied_is_out_of_pages():
    cache = small_cache(num_pages=1)
    first = cache.add()
    grow(cache, first, [1, 2])
    twin = cache.fork(first)
    before = state(cache)
    for call in (lambda: cache.append([twin], [1]), lambda: cache.commit([first], [0], [[1]])):
        with pytest.raises(OutOfPages, match="1 pages of 3 tokens are needed .* 0 of 1 are free"):
            call()
        assert state(cache) == before


def test_a_full_page_stays_shared_when_a_fork_grows_behind_it():
    cache = small_cache(num_pages=3)
    first = cache.add()
    grow(cache, first, [1, 2, 3])
    twin = cache.fork(first)
    cache.append([first, twin], [1, 1])  # one page for each; a copy would not fit
    assert cache.pages(first)[0] == cache.pages(twin)[0] and cache.free_pages == 0


def test_a_commit_needs_no_free_page_but_those_it_copies():
    cache = small_cache(num_pages=2)
    first = cache.add()
    grow(cache, first, range(1, 7))
    cache.commit([first], [0], [[0, 2, 4, 5]])
    assert read(cache, first) == [1, 3, 5, 6] and cache.free_pages == 0
    cache.truncate(first, 3)
    twin = cache.fork(first)
    cache.commit([first], [0], [[1, 2]])
    assert read(cache, first) == [3, 5] and read(cache, twin) == [1, 3, 5] and cache.free_pages == 0


def test_forks_that_grow_together_need_one_copy_less():
    """Once one of two sharers has its copy, the other owns the page: one free page is enough."""
    cache = small_cache(num_pages=2)
    first = cache.add()
    grow(cache, first, [1])
    twin = cache.fork(first)
    cache.append([first, twin], [1, 1])
    assert set(cache.pages(first)) != set(cache.pages(twin))


def test_a_layer_of_a_cache_is_the_same_memory():
    cache, first, _ = two_sequences()
    for layer in range(LAYERS):
        alone = cache.of_layer(layer)
        assert alone.num_layers == len(alone.key_pages) == len(alone.value_slots) == 1 and alone.pages(
            first
        ) == cache.pages(first)
        assert (
            alone.key_pages.data_ptr() == cache.key_pages[layer].data_ptr()
            and alone.value_slots[0].data_ptr() == cache.value_slots[layer].data_ptr()
        )


def test_keys_and_values_may_differ_in_size():
    cache = PagedKVCache(1, 2, 4, num_kv_heads=3, head_dim=8, value_head_dim=5, dtype=torch.bfloat16)
    assert (
        cache.key_pages.shape == (1, 2, 4, 3, 8)
        and cache.value_slots[0].shape == (8, 3, 5)
        and cache.key_pages.dtype == torch.bfloat16
    )
    assert PagedKVCache(1, 2, 4, num_kv_heads=3, head_dim=8).value_pages.shape == (1, 2, 4, 3, 8)


@pytest.mark.parametrize(("kv_dtype", "stored"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_quantised_cache_keeps_a_scale_for_every_token_and_head(kv_dtype, stored, dtype):
    cache = PagedKVCache(2, 3, 4, num_kv_heads=5, head_dim=8, value_head_dim=6, dtype=dtype, kv_dtype=kv_dtype)
    assert (cache.dtype, cache.kv_dtype, cache.key_pages.dtype, cache.value_pages.dtype) == (
        dtype,
        kv_dtype,
        stored,
        stored,
    )
    for scales, slots in ((cache.key_scales, cache.key_scale_slots), (cache.value_scales, cache.value_scale_slots)):
        assert scales.shape == (2, 3, 4, 5) and scales.dtype == torch.float32
        scales[1, 2, 3, 4] = 7.0
        assert slots[1].shape == (12, 5) and slots[1][11, 4] == 7.0, "a view of the same memory"


def test_a_plain_cache_has_no_scales_and_an_unknown_format_is_refused_by_name():
    sizes = dict(num_layers=1, num_pages=1, page_size=1, num_kv_heads=1, head_dim=1)
    cache = PagedKVCache(**sizes, dtype=torch.float16)
    assert (
        cache.key_scales is None
        and cache.value_scales is None
        and cache.kv_dtype is None
        and cache.dtype == torch.float16
    )
    with pytest.raises(ValueError, match="'int4'"):
        PagedKVCache(**sizes, kv_dtype="int4")


def test_slots_and_heads_are_views_of_the_pages():
    cache = PagedKVCache(2, 3, 4, num_kv_heads=2, head_dim=5, value_head_dim=3)
    cache.key_pages.copy_(torch.randn(cache.key_pages.shape))
    cache.value_pages.copy_(torch.randn(cache.value_pages.shape))
    for layer in range(2):
        for pages, slots, heads in (
            (cache.key_pages, cache.key_slots, cache.key_heads),
            (cache.value_pages, cache.value_slots, cache.value_heads),
        ):
            assert heads[layer].shape == (1, 2, 12, pages.shape[-1])
            for slot in range(12):
                assert slots[layer][slot].equal(pages[layer, slot // 4, slot % 4])
                assert heads[layer][0, :, slot].equal(slots[layer][slot])
            assert heads[layer].data_ptr() == slots[layer].data_ptr() == pages[layer].data_ptr()
