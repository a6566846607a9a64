"""Random calls on an index over two tables, with memory simulated in plain Python.

A slot holds the tokens from the start of the text to its own, which is what keys and values are a function of."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from attention.kv.page_table import OutOfPages, PageTable
from attention.kv.prefix import PrefixIndex, block_keys

PAGES, SIZE = (7, 6), 2
BOTH = (0, 1)
# two kinds of tokens only, so that prefixes meet
TEXTS = st.builds(lambda bits, n: [bits >> i & 1 for i in range(n)], st.integers(0, 255), st.sampled_from(range(2, 9)))


class ObservedTable(PageTable):
    """A table that checks whom it evicts: always the oldest of `order`, its reusable pages as a model lists them."""

    def __init__(self, num_pages):
        super().__init__(num_pages, SIZE, debug=True)
        self.order, self.evicted = [], 0

    def owned(self):
        return {page for sequence in self.sequences for page in self.pages(sequence)}

    def register(self, page, on_loss):
        def lost(page):
            owned = self.owned()
            if page not in owned:
                left = [p for p in self.order if p == page or (self.is_registered(p) and p not in owned)]
                assert left[0] == page, f"{page} evicted before {left[0]}"
                self.evicted += 1
            on_loss(page)

        super().register(page, lost)

    def settle(self, released):
        """Bring `order` up to date: `released` pages that may be reused come last, in that order."""
        owned = self.owned()
        reusable = {page for page in range(self.num_pages) if self.is_registered(page) and page not in owned}
        last = {page: i for i, page in enumerate(released)}
        kept = [page for page in self.order if page in reusable]
        self.order = kept + sorted(reusable - {*kept}, key=last.__getitem__)
        assert list(self._reusable) == self.order


@dataclass
class Row:
    sequences: list[int]  # one a table
    contents: list[list[tuple]]  # what each of them must read
    freed: list[int] = field(default_factory=lambda: [0, 0])  # tokens at the front of each whose pages were given back


def history(tokens):
    return [tuple(tokens[: i + 1]) for i in range(len(tokens))]


class PrefixMachine(RuleBasedStateMachine):
    """After every call each sequence reads its tokens, a block holds the text of its key, and no page is lost."""

    rows = Bundle("rows")

    def __init__(self):
        super().__init__()
        self.tables = [ObservedTable(pages) for pages in PAGES]
        self.index = PrefixIndex(self.tables)
        self.memory = [{}, {}]
        self.live: list[Row] = []
        self.texts: dict[bytes, tuple] = {}
        self.junk = 0

    def keys(self, tokens):
        keys = block_keys(tokens, SIZE)
        self.texts |= {key: tuple(tokens[: (i + 1) * SIZE]) for i, key in enumerate(keys)}
        return keys

    def step(self, i, rows, call):
        """Run `call` on table i; what `rows` release there is released in their order, the last pages first."""
        table = self.tables[i]
        before = [(row.sequences[i], table.pages(row.sequences[i])) for row in rows]
        result = call(table)
        left = {s: table.pages(s) if s in table.sequences else () for s, _ in before}
        table.settle([page for s, pages in before for page in reversed(pages) if page not in left[s]])
        return result

    def copy_pages(self, i, copies):
        for source, target in copies:
            for offset in range(SIZE):
                self.memory[i][target * SIZE + offset] = self.memory[i].get(source * SIZE + offset)

    def reserve(self, i, rows, counts):
        """Append in table i without writing -> whether there was room. Blank pages go first; no room, no change."""
        table, state = self.tables[i], lambda: ([t.order for t in self.tables], len(self.index), table.owned())
        before, owned, blank, evicted = state(), len(table.owned()), table.blank_pages, table.evicted
        try:
            copies = self.step(i, rows, lambda t: t.append([row.sequences[i] for row in rows], counts))
        except OutOfPages:
            assert state() == before
            return False
        self.copy_pages(i, copies)
        assert table.evicted - evicted <= max(0, len(table.owned()) - owned - blank)
        return True

    def write(self, i, row, contents):
        start = len(row.contents[i])
        slots = self.tables[i].slots(row.sequences[i], range(start, start + len(contents)))
        self.memory[i] |= dict(zip(slots, contents, strict=True))
        row.contents[i] += contents

    def text(self, row):
        """The tokens that both tables hold as a text from its start."""
        shared = [a for a, b in zip(*row.contents, strict=False) if a == b]
        length = 0
        while length < len(shared) and list(shared[length]) == [c[-1] for c in shared[: length + 1]]:
            length += 1
        return list(shared[length - 1]) if length else []

    def let_extend(self, row, keys):
        """Extend both sequences; what they must read then is the text of their keys."""
        known, held = self.index.known(keys), len(row.contents[0]) // SIZE
        blocks = self.index.extend(row.sequences, keys)
        assert blocks == max(held, known)
        for i, table in enumerate(self.tables):
            table.settle([])
            if blocks > held:
                row.contents[i] = history(self.texts[keys[blocks - 1]])

    def end(self, row):
        self.live.remove(row)
        for i in BOTH:
            self.step(i, [row], lambda table, i=i: table.free(row.sequences[i]))

    @initialize(target=rows, tokens=TEXTS)
    def first(self, tokens):
        return self.start_row(tokens, early=True)

    @rule(target=rows, tokens=TEXTS, early=st.booleans())
    def start(self, tokens, early):
        return self.start_row(tokens, early)

    @rule(tokens=TEXTS)
    def pass_through(self, tokens):
        """A text that ends at once leaves its blocks for reuse."""
        if isinstance(row := self.start_row(tokens, early=True), Row):
            self.end(row)

    def start_row(self, tokens, early):
        """A new text shares what is known and computes the rest; `early` registers it before it is computed."""
        row = Row([table.add() for table in self.tables], [[], []])
        self.live.append(row)
        keys = self.keys(tokens)
        self.let_extend(row, keys)
        shared = len(row.contents[0])
        if not all(self.reserve(i, [row], [len(tokens) - shared]) for i in BOTH):
            self.end(row)
            return multiple()
        if early:
            self.index.register(row.sequences, keys)
        for i in BOTH:
            self.write(i, row, history(tokens)[shared:])
        return row

    @rule(tokens=TEXTS)
    def fail(self, tokens):
        """A forward that fails after another text took its blocks over: neither leaves anything in the index."""
        first, second = (Row([table.add() for table in self.tables], [[], []]) for _ in range(2))
        self.live += [first, second]
        keys = self.keys(tokens)
        self.let_extend(first, keys)
        if all(self.reserve(i, [first], [len(tokens) - len(first.contents[0])]) for i in BOTH):
            new = self.index.register(first.sequences, keys)
            before = len(self.index)
            assert self.index.extend(second.sequences, keys) == len(keys)
            self.index.forget(new)
            assert len(self.index) == before - len(new) and self.index.known(keys) == len(keys) - len(new)
        self.end(second)
        self.end(first)

    @rule(chosen=st.lists(rows, max_size=2, unique_by=id), tokens=TEXTS, where=st.sampled_from([(0,), (1,), BOTH]))
    def append(self, chosen, tokens, where):
        self.append_to(chosen, tokens, where)

    def append_to(self, chosen, tokens, where):
        for i in where:
            if self.reserve(i, chosen, [len(tokens)] * len(chosen)):
                for row in chosen:
                    old = row.contents[i][-1] if row.contents[i] else ()
                    self.write(i, row, [(*old, *tokens[: n + 1]) for n in range(len(tokens))])

    @rule(row=rows, path=st.lists(st.booleans(), max_size=4), data=st.data())
    def speculate(self, row, path, data):
        """Append a draft of which the nodes marked in `path` are accepted, and commit them."""
        for i in BOTH:
            if not self.reserve(i, [row], [len(path)]):
                continue
            start, text = len(row.contents[i]), row.contents[i][-1] if row.contents[i] else ()
            nodes = []
            for accepted in path:
                self.junk += 1
                text = (*text, data.draw(st.integers(0, 1))) if accepted else text
                nodes.append(text if accepted else ("junk", self.junk))
            self.write(i, row, nodes)
            self.keep(i, [row], [start], [[n for n, accepted in enumerate(path) if accepted]])

    def keep(self, i, rows, starts, paths):
        try:
            call = lambda table: table.commit([row.sequences[i] for row in rows], starts, paths)
            copies, moves = self.step(i, rows, call)
        except OutOfPages:
            return
        self.copy_pages(i, copies)
        for source, target in (move for segment in moves for move in segment):
            self.memory[i][target] = self.memory[i].get(source)
        for row, start, path in zip(rows, starts, paths, strict=True):
            row.contents[i][start:] = [row.contents[i][start + offset] for offset in path]

    @rule(chosen=st.lists(rows, max_size=2, unique_by=id), where=st.sampled_from(BOTH), data=st.data())
    def commit(self, chosen, where, data):
        lengths = [len(row.contents[where]) for row in chosen]
        starts = [data.draw(st.integers(row.freed[where], n)) for row, n in zip(chosen, lengths, strict=True)]
        left = [range(length - start) for length, start in zip(lengths, starts, strict=True)]
        paths = [sorted(data.draw(st.sets(st.sampled_from(r)))) if r else [] for r in left]
        ends = [start + len(path) for start, path in zip(starts, paths, strict=True)]
        if any(0 < row.freed[where] >= end for row, end in zip(chosen, ends, strict=True)):
            return
        self.keep(where, chosen, starts, paths)

    @rule(target=rows, row=rows)
    def fork(self, row):
        sequences = [table.fork(sequence) for table, sequence in zip(self.tables, row.sequences, strict=True)]
        self.live.append(Row(sequences, [list(contents) for contents in row.contents], list(row.freed)))
        return self.live[-1]

    @rule(row=rows, where=st.sampled_from([(0,), (1,), BOTH]), data=st.data())
    def truncate(self, row, where, data):
        self.truncate_row(row, where, data)

    def truncate_row(self, row, where, data):
        for i in where:
            least = row.freed[i] + 1 if row.freed[i] else 0
            length = data.draw(st.just(0) | st.integers(least, len(row.contents[i])))
            row.freed[i] *= length > 0
            self.step(i, [row], lambda table, i=i, n=length: table.truncate(row.sequences[i], n))
            del row.contents[i][length:]

    @rule(row=rows, where=st.sampled_from([(0,), (1,), BOTH]), window=st.integers(1, 4))
    def free_front(self, row, where, window):
        """Give back what a window does not see; registered pages of it become reusable, the last ones first."""
        for i in where:
            count = len(row.contents[i])
            self.step(i, [row], lambda t, i=i, n=count: t.free_front(row.sequences[i], n, window))
            row.freed[i] = max(row.freed[i], SIZE * min((count + 1 - window) // SIZE, count // SIZE - 1))

    @rule(row=rows, where=st.sampled_from([(0,), (1,), BOTH]), data=st.data())
    def rewrite(self, row, where, data):
        """Go back into a page and write something else: a registered page is copied or loses its block."""
        self.truncate_row(row, where, data)
        self.append_to([row], [data.draw(st.integers(0, 1))], where)

    @rule(row=consumes(rows))
    def free(self, row):
        self.end(row)

    @rule(row=rows)
    def register(self, row):
        keys = self.keys(self.text(row))
        unknown = [key for key in keys if self.index.known([key]) == 0]
        freed = max(row.freed) // SIZE
        assert self.index.freed(row.sequences) == freed
        if self.index.known(keys) < min(freed, len(keys)):
            before = len(self.index)
            with pytest.raises(ValueError, match=f"first {freed} blocks are given back"):
                self.index.register(row.sequences, keys)
            assert len(self.index) == before
            return
        assert self.index.register(row.sequences, keys) == unknown and self.index.known(keys) == len(keys)

    @rule(row=rows, tokens=TEXTS)
    def extend(self, row, tokens):
        text, lengths = self.text(row), [len(contents) for contents in row.contents]
        if lengths == [len(text)] * 2 and len(text) % SIZE == 0:
            self.let_extend(row, self.keys(text + tokens))

    @rule(really=st.integers(0, 3), data=st.data())
    def forget(self, really, data):
        keys = [data.draw(st.sampled_from(sorted(self.texts)))] if self.texts and really == 0 else []
        self.index.forget(keys)
        assert all(self.index.known([key]) == 0 for key in keys)

    @rule(really=st.integers(0, 7))
    def flush(self, really):
        if really == 0:
            self.index.flush()
            assert len(self.index) == 0 and all(table.reusable_pages == 0 for table in self.tables)

    @invariant()
    def everything_is_as_the_model_says(self):
        self.index.check_integrity()
        for i, table in enumerate(self.tables):
            table.check_integrity()
            table.settle([])
            assert table.blank_pages + table.reusable_pages + len(table.owned()) == PAGES[i], "pages are lost"
            for row in self.live:
                first, length = row.freed[i], table.length(row.sequences[i])
                slots = table.slots(row.sequences[i], range(first, length))
                assert length == len(row.contents[i])
                assert [self.memory[i][slot] for slot in slots] == row.contents[i][first:], "it reads other tokens"
            for key, block in self.index._blocks.items():
                slots = range(block.pages[i] * SIZE, (block.pages[i] + 1) * SIZE)
                assert [self.memory[i][slot] for slot in slots] == history(self.texts[key])[-SIZE:], "a false block"


PrefixMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPrefixMachine = PrefixMachine.TestCase
