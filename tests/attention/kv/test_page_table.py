"""The page table alone, against lists of tokens; the copies and moves that it returns are made in plain Python."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from attention.kv.page_table import OutOfPages, PageTable
from attention.kv.stats import CacheStats

PAGES, SIZE = 7, 3


class TableMachine(RuleBasedStateMachine):
    """Random calls; after every one the table is consistent and each live sequence reads back its tokens."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.table, self.memory = PageTable(PAGES, SIZE), [0] * (PAGES * SIZE)
        self.tokens: dict[int, list[int]] = {}
        self.freed: dict[int, int] = {}  # tokens at the front whose pages were given back
        self.next_token = 1

    def copy_pages(self, copies):
        for source, target in copies:
            self.memory[target * SIZE : (target + 1) * SIZE] = self.memory[source * SIZE : (source + 1) * SIZE]

    @rule(target=sequences)
    def add(self):
        sequence = self.table.add()
        self.tokens[sequence], self.freed[sequence] = [], 0
        return sequence

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        twin = self.table.fork(sequence)
        self.tokens[twin], self.freed[twin] = list(self.tokens[sequence]), self.freed[sequence]
        return twin

    @rule(target=sequences, sequence=consumes(sequences))
    def free(self, sequence):
        self.table.free(sequence)
        del self.tokens[sequence]
        return multiple()

    @rule(rows=st.lists(st.tuples(sequences, st.integers(0, 2 * SIZE)), max_size=3, unique_by=lambda row: row[0]))
    def append(self, rows):
        try:
            self.copy_pages(self.table.append([s for s, _ in rows], [count for _, count in rows]))
        except OutOfPages:
            return
        for sequence, count in rows:
            new = range(self.next_token, self.next_token + count)
            length = len(self.tokens[sequence])
            for token, slot in zip(new, self.table.slots(sequence, range(length, length + count)), strict=True):
                self.memory[slot] = token
            self.tokens[sequence] += new
            self.next_token += count

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence, data):
        length = data.draw(st.integers(0, len(self.tokens[sequence])))
        if 0 < length <= self.freed[sequence]:
            with pytest.raises(ValueError, match=f"{self.freed[sequence]} are freed cannot be truncated to {length}"):
                self.table.truncate(sequence, length)
            return
        self.table.truncate(sequence, length)
        del self.tokens[sequence][length:]
        self.freed[sequence] *= length > 0

    @rule(sequence=sequences, window=st.integers(1, 3 * SIZE), data=st.data())
    def free_front(self, sequence, window, data):
        """Of the pages that no token from `committed` on sees, all but the last full one are given back at once."""
        committed = data.draw(st.integers(0, len(self.tokens[sequence])))
        self.table.free_front(sequence, committed, window)
        unseen = [p for p in range(committed) if p <= committed - window]
        whole = [end for end in range(0, committed + 1, SIZE) if end <= len(unseen) and end + SIZE <= committed]
        self.freed[sequence] = max(self.freed[sequence], *whole, 0)
        assert self.table.freed_pages(sequence) * SIZE == self.freed[sequence]

    @rule(chosen=st.lists(sequences, max_size=2, unique=True), data=st.data())
    def commit(self, chosen, data):
        starts = [data.draw(st.integers(self.freed[s], len(self.tokens[s]))) for s in chosen]
        left = [range(len(self.tokens[s]) - start) for s, start in zip(chosen, starts, strict=True)]
        paths = [sorted(data.draw(st.sets(st.sampled_from(r)))) if r else [] for r in left]
        kept = [(self.freed[s], start + len(path)) for s, start, path in zip(chosen, starts, paths, strict=True)]
        if any(0 < length <= freed for freed, length in kept):
            with pytest.raises(ValueError, match="are freed"):
                self.table.commit(chosen, starts, paths)
            return
        try:
            copies, moves = self.table.commit(chosen, starts, paths)
        except OutOfPages:
            return
        self.copy_pages(copies)
        for source, target in (move for segment in moves for move in segment):
            self.memory[target] = self.memory[source]
        for sequence, start, path in zip(chosen, starts, paths, strict=True):
            self.tokens[sequence][start:] = [self.tokens[sequence][start + offset] for offset in path]

    @invariant()
    def every_sequence_reads_back_its_tokens(self):
        self.table.check_integrity()
        assert {*self.table.sequences} == {*self.tokens}
        for sequence, tokens in self.tokens.items():
            assert self.table.length(sequence) == len(tokens)
            first = self.freed[sequence]
            slots = self.table.slots(sequence, range(first, len(tokens)))
            assert [self.memory[slot] for slot in slots] == tokens[first:]
            pages = self.table.pages(sequence)
            assert {*pages[: first // SIZE]} <= {*pages[first // SIZE :][:1]}, "a freed place names the first page left"


TableMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestTableMachine = TableMachine.TestCase


def test_it_needs_no_torch():
    """A fresh interpreter, in which `attention` is an empty package, imports the module without torch."""
    code = (
        "import sys, types; package = types.ModuleType('attention'); package.__path__ = ['attention']; "
        "sys.modules['attention'] = package; import attention.kv.page_table; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0)])
def test_sizes_below_one_are_refused(num_pages, page_size):
    with pytest.raises(ValueError, match=f"num_pages and page_size .* {num_pages} and {page_size}"):
        PageTable(num_pages, page_size)


def lose_a_page(table):
    table._free.pop()


def count_a_reference_too_many(table):
    table._references[0] += 1


def give_out_a_page_twice(table):
    table._free.append(0)


def forget_a_length(table):
    table._entries[1].length += SIZE


def keep_a_page_too_many(table):
    table._entries[1].length -= SIZE


@pytest.mark.parametrize(
    "damage",
    [lose_a_page, count_a_reference_too_many, give_out_a_page_twice, forget_a_length, keep_a_page_too_many],
    ids=lambda f: f.__name__,
)
def test_the_integrity_check_sees_damage(damage):
    table = PageTable(PAGES, SIZE)
    table.append([table.add()], [4])
    table.check_integrity()
    damage(table)
    with pytest.raises(RuntimeError):
        table.check_integrity()


def test_what_only_registered_pages_of_whole_sequences_can_do_is_refused():
    table = PageTable(PAGES, SIZE)
    first, second, third = table.add(), table.add(), table.add()
    table.append([first, second], [2 * SIZE, 1])
    page, other = table.pages(first)
    table.register(page, on_loss=lambda page: None)
    blank = PAGES - 1
    for call, message in [
        (lambda: table.register(page, on_loss=print), f"page {page} of {PAGES}"),
        (lambda: table.register(blank, on_loss=print), f"page {blank} of {PAGES}"),
        (lambda: table.register(-1, on_loss=print), "page -1"),
        (lambda: table.register(PAGES, on_loss=print), f"page {PAGES}"),
        (lambda: table.unregister(other), f"page {other} is not registered"),
        (lambda: table.take_over(second, [page]), "1 tokens ends inside a page of 3"),
        (lambda: table.take_over(first, [page]), rf"\[{page}\]"),
        (lambda: table.take_over(third, [page, page]), rf"\[{page}, {page}\]"),
        (lambda: table.take_over(third, [page, other]), rf"\[{page}, {other}\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        table.check_integrity()
        assert table.length(third) == 0 and table.free_pages == PAGES - 3 and not table.is_registered(other)


def forget_a_registration(table):
    table.register(0, on_loss=print)
    table.free(1)
    del table._registered[0]


def keep_a_page_that_is_owned(table):
    table._reusable[0] = None


def lose_a_reusable_page(table):
    table.register(0, on_loss=print)
    table.free(1)
    table._reusable.popitem()


def register_a_blank_page(table):
    table._registered[PAGES - 1] = print


@pytest.mark.parametrize(
    "damage",
    [forget_a_registration, keep_a_page_that_is_owned, lose_a_reusable_page, register_a_blank_page],
    ids=lambda f: f.__name__,
)
def test_the_integrity_check_sees_damage_to_registered_pages(damage):
    table = PageTable(PAGES, SIZE)
    table.append([table.add()], [4])
    damage(table)
    with pytest.raises(RuntimeError):
        table.check_integrity()


def test_the_page_that_stands_for_freed_ones_is_full_of_committed_tokens():
    """A window of one token ends inside the fourth page, which drafts fill: the third one stays."""
    table = PageTable(PAGES, SIZE)
    sequence = table.add()
    table.append([sequence], [5 * SIZE])
    pages = table.pages(sequence)
    table.free_front(sequence, committed=3 * SIZE + 1, window=1)
    assert table.freed_pages(sequence) == 2 and table.pages(sequence) == (*[pages[2]] * 3, *pages[3:])
    table.free_front(sequence, committed=0, window=1)  # nothing comes back
    assert table.freed_pages(sequence) == 2 and table.free_pages == PAGES - 3


def test_a_registered_page_at_the_front_becomes_reusable():
    table = PageTable(PAGES, SIZE)
    first, second = table.add(), table.add()
    table.append([first], [3 * SIZE])
    page, other, last = table.pages(first)
    table.register(page, on_loss=print)
    table.free_front(first, 3 * SIZE, window=1)
    assert (table.blank_pages, table.reusable_pages) == (PAGES - 2, 1)
    table.take_over(second, [page])
    assert table.pages(first) == (last,) * 3 and table.pages(second) == (page,) and other in table._free
    with pytest.raises(ValueError, match=rf"\[{page}, {page}\]"):
        table.take_over(first, [page, page])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda table: table.free_front(1, 16, window=3), "16 committed tokens .* of 15 tokens"),
        (lambda table: table.free_front(1, -1, window=3), "-1 committed tokens"),
        (lambda table: table.free_front(1, 9, window=0), "a window of 0"),
        (lambda table: table.slots(1, [5, 6]), "15 tokens, of which 6 are freed holds no positions 5 to 6"),
        (lambda table: table.truncate(1, 6), "6 are freed cannot be truncated to 6"),
        (lambda table: table.commit([1], [5], [[0, 2]]), r"\[0, 2\] from 5"),
        (lambda table: table.commit([1], [6], [[]]), "cannot be truncated to 6"),
    ],
)
def test_what_a_sequence_without_its_front_cannot_do_changes_nothing(call, message):
    table = PageTable(PAGES, SIZE)
    table.append([table.add()], [5 * SIZE])
    table.free_front(1, 3 * SIZE, window=SIZE)
    before = table.pages(1), table.length(1), table.free_pages
    with pytest.raises(ValueError, match=message):
        call(table)
    table.check_integrity()
    assert before == (table.pages(1), table.length(1), table.free_pages) and table.freed_pages(1) == 2


def give_back_all_pages(table):
    table.truncate(1, 0)
    table._entries[1].length, table._entries[1].freed = SIZE, 1


def free_a_place_twice(table):
    table._entries[1].freed += 1


@pytest.mark.parametrize("damage", [give_back_all_pages, free_a_place_twice], ids=lambda f: f.__name__)
def test_the_integrity_check_sees_damage_at_the_front(damage):
    table = PageTable(PAGES, SIZE)
    table.append([table.add()], [4 * SIZE])
    table.free_front(1, 4 * SIZE, window=1)
    damage(table)
    with pytest.raises(RuntimeError, match="sequence 1"):
        table.check_integrity()


def test_a_loss_is_told_once_the_page_is_unregistered():
    table, lost = PageTable(2, SIZE), []
    first, second = table.add(), table.add()
    table.append([first], [2 * SIZE])
    for page in table.pages(first):
        table.register(page, lambda page: lost.append((page, table.is_registered(page), table.free_pages)))
    table.truncate(first, SIZE - 1)
    table.append([first], [1])  # into the page that it owns alone
    table.append([second], [1])  # into the page that nobody owns
    assert lost == [(0, False, 1), (1, False, 1)]


def test_the_pages_of_the_first_tokens_may_stay():
    """Of 30 tokens, 27 of them for good, a window of 4 and the first 4 tokens are seen: pages 0, 1 and from 8 on."""
    table = PageTable(24, 3, debug=True)
    sequence = table.add()
    table.append([sequence], [30])
    pages = table.pages(sequence)
    table.free_front(sequence, 27, window=4, sinks=4)
    assert table.free_pages == 24 - 4 and table.freed_pages(sequence) == 8
    assert table.pages(sequence) == (*pages[:2], *[pages[8]] * 6, *pages[8:])
    assert table.held_places(sequence) == [(0, pages[0]), (1, pages[1]), (8, pages[8]), (9, pages[9])]
    assert table.slots(sequence, [0, 5, 24, 29]) == [pages[i] * 3 + j for i, j in ((0, 0), (1, 2), (8, 0), (9, 2))]
    for gone in (6, 23):
        with pytest.raises(ValueError, match="18 are freed holds no positions"):
            table.slots(sequence, [gone])
    stats = CacheStats.of_table(table, 1)
    assert (stats.owned, stats.wasted_tail) == (4, 0)
    table.append([sequence], [7])
    new = table.pages(sequence)
    copies, (moves,) = table.commit([sequence], [30], [[0, 2, 5]])
    assert copies == [] and moves == [(new[10] * 3 + 2, new[10] * 3 + 1), (new[11] * 3 + 2, new[10] * 3 + 2)]
    twin = table.fork(sequence)
    table.free_front(twin, 33, window=4, sinks=4)
    assert table.freed_pages(twin) == 10 and table.freed_pages(sequence) == 8
    for length in (1, 24):
        with pytest.raises(ValueError, match=f"cannot be truncated to {length}"):
            table.truncate(sequence, length)
    table.truncate(sequence, 25)
    assert table.length(sequence) == 25 and table.pages(sequence)[-1] == pages[8]
    for one in (sequence, twin):
        table.truncate(one, 0)
        table.append([one], [4])
        assert table.freed_pages(one) == 0 and len(table.held_places(one)) == 2
        table.free(one)
    assert table.free_pages == 24
