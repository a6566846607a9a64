"""The page table alone, against lists of tokens; the copies and moves that it returns are made in plain Python."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from attention.kv.page_table import OutOfPages, PageTable

PAGES, SIZE = 7, 3


class TableMachine(RuleBasedStateMachine):
    """Random calls; after every one the table is consistent and each live sequence reads back its tokens."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.table, self.memory = PageTable(PAGES, SIZE), [0] * (PAGES * SIZE)
        self.tokens: dict[int, list[int]] = {}
        self.next_token = 1

    def copy_pages(self, copies):
        for source, target in copies:
            self.memory[target * SIZE : (target + 1) * SIZE] = self.memory[source * SIZE : (source + 1) * SIZE]

    @rule(target=sequences)
    def add(self):
        sequence = self.table.add()
        self.tokens[sequence] = []
        return sequence

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        twin = self.table.fork(sequence)
        self.tokens[twin] = list(self.tokens[sequence])
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
        self.table.truncate(sequence, length)
        del self.tokens[sequence][length:]

    @rule(chosen=st.lists(sequences, max_size=2, unique=True), data=st.data())
    def commit(self, chosen, data):
        starts = [data.draw(st.integers(0, len(self.tokens[s]))) for s in chosen]
        left = [range(len(self.tokens[s]) - start) for s, start in zip(chosen, starts, strict=True)]
        paths = [sorted(data.draw(st.sets(st.sampled_from(r)))) if r else [] for r in left]
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
        lengths = {s: self.table.length(s) for s in self.table.sequences}
        found = {s: [self.memory[slot] for slot in self.table.slots(s, range(n))] for s, n in lengths.items()}
        assert found == self.tokens


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
