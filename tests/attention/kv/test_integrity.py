"""The debug flag."""

import pytest

from attention import PagedKVCache
from attention.kv.page_table import PageTable
from attention.kv.prefix import PrefixIndex


def damaged(table):
    table._references[table.num_pages - 1] += 1
    return table


def verbs(table):
    """Every method that changes a table, on one that allows it."""
    first, second = table.add(), table.add()
    table.append([first], [3])
    table.append([second], [2])
    table.register(table.pages(second)[0], lambda page: None)
    return {
        "add": lambda: table.add(),
        "fork": lambda: table.fork(first),
        "append": lambda: table.append([first], [1]),
        "commit": lambda: table.commit([first], [0], [[1]]),
        "truncate": lambda: table.truncate(first, 1),
        "free_front": lambda: table.free_front(first, 3, window=1),
        "free": lambda: table.free(first),
        "take_over": lambda: table.take_over(table.add(), table.pages(second)),
        "register": lambda: table.register(table.pages(first)[0], lambda page: None),
        "unregister": lambda: table.unregister(table.pages(second)[0]),
    }


@pytest.mark.parametrize("verb", list(verbs(PageTable(8, 2))))
def test_every_change_ends_with_a_check_if_that_is_wanted(verb):
    table = PageTable(8, 2, debug=True)
    call = verbs(table)[verb]
    damaged(table)
    with pytest.raises(RuntimeError, match="page 7 has 1 references"):
        call()
    table = PageTable(8, 2, debug=False)
    call = verbs(table)[verb]
    damaged(table)
    call()


def test_every_verb_is_among_them():
    unchanging = {"length", "pages", "freed_pages", "held_places", "slots", "pages_for", "is_registered"}
    unchanging |= {"check_integrity"}
    public = {name for name, held in vars(PageTable).items() if callable(held) and not name.startswith("_")}
    assert public - unchanging == set(verbs(PageTable(8, 2)))


@pytest.mark.parametrize(("value", "debug"), [(None, False), ("0", False), ("1", True)])
def test_the_environment_decides_where_nobody_else_does(monkeypatch, value, debug):
    monkeypatch.delenv("SPECDEC_CHECK_KV", raising=False)
    if value is not None:
        monkeypatch.setenv("SPECDEC_CHECK_KV", value)
    table = PagedKVCache(1, 2, 2, num_kv_heads=1, head_dim=1).table
    assert table.debug is PrefixIndex([table]).debug is debug
    assert PageTable(1, 1, debug=not debug).debug is not debug


def test_an_index_checks_itself_where_a_table_does():
    index = PrefixIndex([PageTable(4, 2, debug=False), PageTable(4, 2, debug=True)])
    index._keys[0][3] = b"none"
    with pytest.raises(RuntimeError, match="table 0"):
        index.flush()
