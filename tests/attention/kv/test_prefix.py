"""Block keys, and the index by hand; random calls are in test_prefix_machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attention.kv.page_table import OutOfPages, PageTable
from attention.kv.prefix import PrefixIndex, block_keys

SIZE = 2
TEXT = [5, 6, 7, 8, 9, 10]
KEYS = block_keys(TEXT, SIZE)
# `attention` as an empty package: the module needs no torch
BARE_PACKAGE = (
    "import sys, types; package = types.ModuleType('attention'); package.__path__ = ['attention']; "
    "sys.modules['attention'] = package; "
)


def indexed(*num_pages: int, tokens: int = len(TEXT)) -> tuple[PrefixIndex, list[int]]:
    """An index over tables of so many pages, and a sequence in each that holds `TEXT` registered."""
    index = PrefixIndex([PageTable(pages, SIZE, debug=True) for pages in num_pages])
    sequences = started(index, tokens)
    index.register(sequences, KEYS[: tokens // SIZE])
    return index, sequences


def started(index: PrefixIndex, tokens: int = 0) -> list[int]:
    sequences = [table.add() for table in index.tables]
    for table, sequence in zip(index.tables, sequences, strict=True):
        table.append([sequence], [tokens])
    return sequences


def state(index: PrefixIndex) -> tuple:
    tables = [([(s, table.pages(s)) for s in table.sequences], table.reusable_pages) for table in index.tables]
    return tables, len(index), index.known(KEYS)


def test_only_full_pages_have_keys():
    for length, size, blocks in [(0, 4, 0), (3, 4, 0), (4, 4, 1), (7, 4, 1), (8, 4, 2), (3, 1, 3)]:
        keys = block_keys(range(length), size)
        assert len(keys) == len(set(keys)) == blocks and all(len(key) == 16 for key in keys)


def test_a_key_depends_on_every_token_before_its_end_and_on_none_after():
    for changed in range(len(TEXT)):
        other = block_keys([token + (i == changed) for i, token in enumerate(TEXT)], SIZE)
        same = changed // SIZE
        assert other[:same] == KEYS[:same] and not set(other[same:]) & set(KEYS)
    assert block_keys(TEXT[:5], SIZE) == KEYS[:2]


def test_tokens_are_hashed_whole():
    values = [0, 1, -1, 255, 256, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)]
    assert len({block_keys([value], 1)[0] for value in values}) == len(values)


def test_extras_of_other_types_and_borders_differ():
    lists = [(), ("a",), (b"a",), ("ab",), ("a", "b"), ("b", "a"), ("", "ab"), ("ab", ""), (1,), ("1",), (1, 1), (11,)]
    lists += [(-1,), (2**200,), ("\ud800",), (b"\xff",), (97,), ("0x61",), ("asb",), ("a" * 300,)]
    assert len({block_keys(TEXT, SIZE, extras)[0] for extras in lists}) == len(lists)
    assert block_keys(TEXT, SIZE, ["a", 1]) == block_keys(TEXT, SIZE, ("a", 1))


def test_keys_are_the_same_in_every_process_and_need_no_torch():
    code = (
        "from attention.kv.prefix import block_keys; assert 'torch' not in sys.modules; "
        f"print(block_keys({TEXT}, {SIZE}, ('x', 1))[-1].hex())"
    )
    options = dict(check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    seeds = [os.environ | {"PYTHONHASHSEED": seed} for seed in "12"]
    runs = [subprocess.run([sys.executable, "-c", BARE_PACKAGE + code], env=seed, **options) for seed in seeds]
    assert {run.stdout.strip() for run in runs} == {block_keys(TEXT, SIZE, ("x", 1))[-1].hex()}


def test_bad_arguments_of_keys_are_named():
    with pytest.raises(ValueError, match="page_size .* 0"):
        block_keys(TEXT, 0)
    for extra in (1.5, None, ("a",)):
        with pytest.raises(TypeError, match="extras"):
            block_keys(TEXT, SIZE, (extra,))


def test_tables_must_be_different_and_of_one_page_size():
    table = PageTable(4, 2)
    for tables in ([], [table, table], [table, PageTable(4, 3)]):
        with pytest.raises(ValueError, match="equal page size"):
            PrefixIndex(tables)


def test_blocks_are_shared_with_a_live_and_with_an_ended_sequence():
    index, first = indexed(6, 5)
    second = started(index)
    assert index.extend(second, KEYS[:2]) == 2
    pages = [table.pages(s) for table, s in zip(index.tables, first, strict=True)]
    assert [table.pages(s) for table, s in zip(index.tables, second, strict=True)] == [p[:2] for p in pages]
    for table, s in zip(index.tables, first, strict=True):
        table.free(s)
    assert [table.reusable_pages for table in index.tables] == [1, 1]
    assert index.extend(second, KEYS) == 3
    assert [table.pages(s) for table, s in zip(index.tables, second, strict=True)] == pages


def test_the_first_pages_under_a_key_stay():
    index, first = indexed(8)
    twin = started(index, len(TEXT))
    assert index.register(twin, KEYS) == []
    index.tables[0].free(twin[0])
    assert index.tables[0].reusable_pages == 0 and len(index) == 3
    assert index.register(first, KEYS) == []


def test_a_block_needed_in_one_table_is_forgotten_in_all_with_what_follows():
    index, (first, second) = indexed(4, 9)
    narrow, wide = index.tables
    narrow.free(first)
    wide.free(second)
    assert (narrow.reusable_pages, narrow.blank_pages, wide.reusable_pages) == (3, 1, 3)
    taken = narrow.add()
    narrow.append([taken], [2 * SIZE])  # the blank page and the last block's
    assert index.known(KEYS) == len(index) == 2 and (wide.reusable_pages, wide.blank_pages) == (2, 7)
    narrow.append([taken], [2 * SIZE])
    assert len(index) == 0 and wide.blank_pages == 9


def test_texts_are_evicted_in_the_order_of_their_last_use():
    index, (first,) = indexed(4, tokens=4)
    (table,) = index.tables
    other_keys = block_keys([1, 2, 3, 4], SIZE)
    (other,) = started(index, 4)
    index.register([other], other_keys)
    table.free(first)
    table.free(other)
    (third,) = started(index)
    assert index.extend([third], KEYS) == 2  # the older text is used once more
    table.free(third)
    table.append([table.add()], [1])
    assert index.known(other_keys) == 1 and index.known(KEYS) == 2
    table.append([table.add()], [SIZE + 1])
    assert index.known(other_keys) == 0 and index.known(KEYS) == 1, "the head of a text is evicted last"


def test_an_only_owner_that_writes_into_its_block_ends_it():
    index, (sequence,) = indexed(6)
    (table,) = index.tables
    table.truncate(sequence, 3)
    assert index.known(KEYS) == 3, "nothing is written yet"
    assert table.append([sequence], [1]) == []
    assert index.known(KEYS) == len(index) == 1 and table.blank_pages == 4


def test_a_shared_block_is_copied_before_a_write_and_stays():
    index, first = indexed(6)
    (table,) = index.tables
    second = started(index)
    index.extend(second, KEYS)
    table.truncate(second[0], 3)
    assert table.append(second, [1]) == [(1, 3)] and index.known(KEYS) == 3
    copies, moves = table.commit(first, [0], [[0, 1, 2, 4]])  # into the second block, which it now owns alone
    assert copies == [] and moves == [[(4, 3)]] and index.known(KEYS) == len(index) == 1


def test_a_failed_forward_takes_what_was_built_on_it_along():
    index, _ = indexed(8, tokens=2)
    first = started(index)
    index.extend(first, KEYS)
    index.tables[0].append(first, [2])
    new = index.register(first, KEYS[:2])
    assert new == KEYS[1:2]
    second = started(index)
    index.extend(second, KEYS)
    index.tables[0].append(second, [2])
    index.register(second, KEYS)
    index.forget(new)
    assert len(index) == index.known(KEYS) == 1


def test_flush_forgets_everything_and_loses_no_page():
    index, (sequence, _) = indexed(4, 5)
    index.tables[0].free(sequence)
    index.flush()
    assert len(index) == index.known(KEYS) == 0
    assert [table.blank_pages for table in index.tables] == [4, 2]


BAD_CALLS = {
    "register for one table": (lambda i, s: i.register(s[:1], KEYS), "2 tables"),
    "register more keys than pages": (lambda i, s: i.register(s, [*KEYS, b"x"]), r"4 keys .* \[6, 6\]"),
    "register a key twice": (lambda i, s: i.register(s, [KEYS[0], KEYS[0]]), "2 keys, 1 different"),
    "register under other keys": (lambda i, s: i.register(s, block_keys(TEXT, SIZE, ("x",))), "registered already"),
    "extend one table": (lambda i, s: i.extend(s[:1], KEYS), "2 tables"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_and_change_nothing(name):
    call, message = BAD_CALLS[name]
    index, sequences = indexed(8, 8)
    before = state(index)
    with pytest.raises(ValueError, match=message):
        call(index, sequences)
    assert state(index) == before


def test_a_sequence_does_not_take_a_block_twice():
    """Its keys are not those of its own blocks."""
    index, _ = indexed(8, 8)
    sequences = started(index)
    index.extend(sequences, KEYS[:1])
    before = state(index)
    with pytest.raises(ValueError, match=r"\(0,\) .* already"):
        index.extend(sequences, [KEYS[2], KEYS[0]])
    assert state(index) == before


def test_sequences_of_different_lengths_are_not_extended():
    index, (first, second) = indexed(8, 8)
    index.tables[1].truncate(second, 4)
    with pytest.raises(ValueError, match=r"lengths \[6, 4\]"):
        index.extend([first, second], KEYS)
    index.tables[1].truncate(second, 3)
    index.tables[0].truncate(first, 3)
    with pytest.raises(ValueError, match=r"lengths \[3, 3\]"):
        index.extend([first, second], KEYS)


def test_no_room_evicts_nothing():
    index, (first,) = indexed(4)
    (table,) = index.tables
    table.free(first)
    with pytest.raises(OutOfPages, match="5 pages .* 4 of 4 are free"):
        table.append([table.add()], [5 * SIZE])
    assert index.known(KEYS) == 3


def lose_a_key(index):
    del index._keys[0][index._blocks[KEYS[1]].pages[0]]


def lose_a_head(index):
    index._blocks[KEYS[1]].before = b"another"


def follow_twice(index):
    index._blocks[KEYS[0]].after.add(KEYS[2])


def unregister_a_page(index):
    index.tables[0].unregister(index._blocks[KEYS[2]].pages[0])


@pytest.mark.parametrize(
    "damage", [lose_a_key, lose_a_head, follow_twice, unregister_a_page], ids=lambda damage: damage.__name__
)
def test_the_integrity_check_sees_damage(damage):
    index, _ = indexed(5, 5)
    index.check_integrity()
    damage(index)
    with pytest.raises(RuntimeError):
        index.check_integrity()
