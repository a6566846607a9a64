"""Which pages of the KV cache each sequence owns: bookkeeping on the host, without tensors (Kwon et al. 2023).

A page is *owned* by one or more sequences, *reusable* (no owner, but what it holds is registered, so that a later
sequence may take it over), or *blank*."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

from attention.kv.integrity import checked, debug_from_environment
from attention.kv.sequence import PagedSequence


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than a request needs. Nothing was allocated or freed when it is raised."""


class PageTable:
    """Block tables, reference counts and free pages of `num_pages` pages of `page_size` tokens.

    Sequences are named by the integers that `add` and `fork` return. Every method checks before it changes anything: an
    error leaves the table as it was. `append` and `commit` return what must be copied in memory to match the table, to
    be done before the next call.

    `register` keeps a page for reuse. Blank pages are taken first, then reusable ones, the least recently released
    first. A registered page is copied before a write where it is shared, else unregistered. `free_front` gives back
    what no sliding window reaches any more. `debug` ends every change with `check_integrity`; None reads the
    environment variable `SPECDEC_CHECK_KV`.

    >>> table = PageTable(num_pages=4, page_size=4)
    >>> first = table.add()
    >>> table.append([first], [6])
    []
    >>> second = table.fork(first)
    >>> table.pages(first), table.pages(second), table.free_pages
    ((0, 1), (0, 1), 2)
    >>> table.append([second], [1])  # page 1 is shared: `second` gets a copy of it
    [(1, 2)]
    >>> table.commit([first], [1], [[1, 4]])  # from position 1 on, keep offsets 1 and 4
    ([(0, 3)], [[(14, 13), (5, 14)]])
    >>> table.length(first), table.pages(first)
    (3, (3,))
    >>> table.register(3, on_loss=lambda page: print(f"lost {page}"))
    >>> table.free(first)
    >>> table.blank_pages, table.reusable_pages, table.free_pages
    (1, 1, 2)
    >>> table.append([second], [9])
    lost 3
    []
    """

    def __init__(self, num_pages: int, page_size: int, debug: bool | None = None):
        if min(num_pages, page_size) < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self.debug = debug_from_environment() if debug is None else debug
        self._entries: dict[int, PagedSequence] = {}
        self._free = list(range(num_pages - 1, -1, -1))  # the blank ones
        self._reusable: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._registered: dict[int, Callable[[int], object]] = {}  # page: whom to tell of its loss
        self._references = [0] * num_pages  # sequences that own each page; more than one after a fork
        self._last = 0

    @property
    def free_pages(self) -> int:
        """Pages that `append` can take: the blank and the reusable ones."""
        return len(self._free) + len(self._reusable)

    @property
    def blank_pages(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def reusable_pages(self) -> int:
        """Registered pages that no sequence owns."""
        return len(self._reusable)

    def is_registered(self, page: int) -> bool:
        """Whether `page` is registered."""
        return page in self._registered

    @property
    def sequences(self) -> tuple[int, ...]:
        """The live sequences."""
        return tuple(self._entries)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence fill."""
        return -(-tokens // self.page_size)

    def length(self, sequence: int) -> int:
        """Tokens that `sequence` holds."""
        return self._entry(sequence).length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The block table of `sequence`: its pages in order; see `PagedSequence.block_table`."""
        return self._entry(sequence).block_table

    def freed_pages(self, sequence: int) -> int:
        """How many places of the block table of `sequence` end before what is left after `free_front`."""
        return self._entry(sequence).start // self.page_size

    def held_places(self, sequence: int) -> list[tuple[int, int]]:
        """See `PagedSequence.held_places`."""
        return self._entry(sequence).held_places

    def slots(self, sequence: int, positions: Sequence[int]) -> list[int]:
        """The slot (page * page size + offset) of each position of `sequence`."""
        return self._entry(sequence).slots(positions)

    def _entry(self, sequence: int) -> PagedSequence:
        if sequence not in self._entries:
            raise KeyError(f"sequence {sequence} is not in the cache; live sequences: {list(self._entries)}")
        return self._entries[sequence]

    @checked
    def add(self) -> int:
        """Start an empty sequence."""
        self._last += 1
        self._entries[self._last] = PagedSequence(self._last, self.page_size)
        return self._last

    @checked
    def fork(self, sequence: int) -> int:
        """Start a sequence with the same tokens. Pages are shared; `append` and `commit` copy those they write to."""
        entry = self._entry(sequence)
        twin = self.add()
        self._entries[twin] = replace(entry, number=twin)
        for page in entry.pages:
            self._references[page] += 1
        return twin

    @checked
    def free(self, sequence: int) -> None:
        """End `sequence` and give back its pages."""
        self.truncate(sequence, 0)
        del self._entries[sequence]

    @checked
    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of `sequence` and give back the pages after them.

        After `free_front` a `length` other than 0 must leave a page."""
        # the last first: blank pages are then taken in rising order, and a prefix loses its end before its head
        for page in reversed(self._entry(sequence).cut(length)):
            self._drop(page)

    @checked
    def free_front(self, sequence: int, committed: int, window: int, sinks: int = 0) -> None:
        """Give back the first pages of `sequence`, of which no token after the first `committed` ones sees any.

        Each token sees the last `window` ones, itself included, and the first `sinks`, whose pages stay; see
        `PagedSequence.give_back`. Registered pages become reusable."""
        for page in reversed(self._entry(sequence).give_back(committed, window, self.pages_for(sinks))):
            self._drop(page)

    @checked
    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
        """Grow each sequence by its count of tokens -> the page copies (source, target) that must be made.

        A last page that a fork shares is replaced by a copy, so that writing to it reaches no other sequence. Raises
        OutOfPages, before any sequence has grown."""
        if len(set(sequences)) != len(sequences) or len(sequences) != len(counts) or min(counts, default=0) < 0:
            raise ValueError(
                f"sequences must be distinct with one count >= 0 each, got {list(sequences)} and {list(counts)}"
            )
        entries = [self._entry(s) for s in sequences]
        grown = list(zip(entries, counts, strict=True))
        written = [(entry, {len(entry.pages) - 1}) for entry, count in grown if count and entry.length % self.page_size]
        fresh = [self.pages_for(entry.length + count) - entry.places for entry, count in grown]
        copies = self._prepare(written, sum(fresh), f"append {sum(counts)} tokens to {len(entries)} sequences")
        for (entry, count), new in zip(grown, fresh, strict=True):
            if new:
                entry.pages += tuple(self._take() for _ in range(new))
            entry.length += count
        return copies

    @checked
    def commit(
        self, sequences: Sequence[int], starts: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
        """Of the tokens from position `start` on keep only those of `path`, increasing offsets, and close the gaps.

        Returns the page copies (source, target) to make, then the slot moves (source, target) of each sequence. Raises
        ValueError for a path that is not increasing or leaves the sequence, and OutOfPages where a page that a fork
        shares would have to be copied."""
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences must be distinct, got {list(sequences)}")
        entries = [self._entry(sequence) for sequence in sequences]
        moves = [entry.moves(start, path) for entry, start, path in zip(entries, starts, paths, strict=True)]
        pairs = list(zip(entries, moves, strict=True))
        written = [(entry, {target // self.page_size - entry.freed for _, target in its}) for entry, its in pairs]
        copies = self._prepare(written, 0, f"commit paths of {len(entries)} sequences")
        slot = lambda entry, position: entry.slots([position])[0]
        slots = [[(slot(entry, a), slot(entry, b)) for a, b in its] for entry, its in pairs]
        for sequence, start, path in zip(sequences, starts, paths, strict=True):
            self.truncate(sequence, start + len(path))
        return copies, slots

    @checked
    def take_over(self, sequence: int, pages: Sequence[int]) -> None:
        """Grow `sequence`, whose pages are all full, by registered `pages` and what they hold. Nothing is copied.

        Raises ValueError for a sequence that ends inside a page, and for a page that is not registered, comes twice or
        is in the sequence already."""
        entry = self._entry(sequence)
        if entry.length % self.page_size:
            raise ValueError(f"sequence {sequence} of {entry.length} tokens ends inside a page of {self.page_size}")
        new = len({*entry.pages, *pages}) == len(entry.pages) + len(pages)
        if not new or any(page not in self._registered for page in pages):
            raise ValueError(f"pages must be registered, distinct and new to sequence {sequence}, got {list(pages)}")
        for page in pages:
            self._reusable.pop(page, None)
            self._references[page] += 1
        entry.pages += tuple(pages)
        entry.length += len(pages) * self.page_size

    @checked
    def register(self, page: int, on_loss: Callable[[int], object]) -> None:
        """Keep what an owned `page` holds after its last owner, until the page is needed for other tokens.

        Then it is unregistered and `on_loss(page)` is called, which may unregister further pages and do nothing else to
        the table. Raises ValueError for a page that no sequence owns or that is registered already."""
        if not 0 <= page < self.num_pages or not self._references[page] or page in self._registered:
            raise ValueError(f"page {page} of {self.num_pages} must be owned and not yet registered")
        self._registered[page] = on_loss

    @checked
    def unregister(self, page: int) -> None:
        """Stop keeping what `page` holds; `on_loss` is not called. Raises ValueError for one that is not registered."""
        if page not in self._registered:
            raise ValueError(f"page {page} is not registered")
        del self._registered[page]
        if page in self._reusable:
            del self._reusable[page]
            self._free.append(page)

    def _lose(self, page: int) -> None:
        on_loss = self._registered[page]
        self.unregister(page)
        on_loss(page)

    def _prepare(
        self, written: Sequence[tuple[PagedSequence, set[int]]], fresh: int, purpose: str
    ) -> list[tuple[int, int]]:
        """Replace those of the pages (indices into `entry.pages`) that are shared, and return (old, new) of each.

        Pages with one owner are unregistered. Raises OutOfPages where these copies and `fresh` further pages do not
        fit; else at least `fresh` pages are blank afterwards."""
        shared = [(entry, i) for entry, indices in written for i in indices if self._references[entry.pages[i]] > 1]
        writers = Counter(entry.pages[i] for entry, i in shared)
        # the last owner of a page keeps it
        needed = fresh + sum(min(n, self._references[page] - 1) for page, n in writers.items())
        if needed > self.free_pages:
            free = f"{self.free_pages} of {self.num_pages} are free"
            raise OutOfPages(f"{needed} pages of {self.page_size} tokens are needed to {purpose}, but {free}")
        while len(self._free) < needed:
            self._lose(next(iter(self._reusable)))
        copies = []
        for entry, i in shared:
            old = entry.pages[i]
            if self._references[old] > 1:
                copies.append((old, own := self._take()))
                entry.pages = (*entry.pages[:i], own, *entry.pages[i + 1 :])
                self._drop(old)
        for page in [entry.pages[i] for entry, indices in written for i in indices]:
            if page in self._registered:  # its only owner is about to write to it
                self._lose(page)
        return copies

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0 and page in self._registered:
            self._reusable[page] = None
        elif self._references[page] == 0:
            self._free.append(page)

    def check_integrity(self) -> None:
        """Raise RuntimeError where blank, reusable and registered pages, references and block tables disagree."""
        owned = Counter(page for entry in self._entries.values() for page in entry.pages)
        for page, references in enumerate(self._references):
            if references != owned[page]:
                raise RuntimeError(f"page {page} has {references} references and is in {owned[page]} block tables")
        if sorted([*self._free, *self._reusable, *owned]) != list(range(self.num_pages)):
            raise RuntimeError(f"pages are lost or double: {self._free}, {list(self._reusable)}, {sorted(owned)}")
        if set(self._reusable) != self._registered.keys() - owned.keys():
            raise RuntimeError(f"{list(self._reusable)} are not what is registered and not owned: {self._registered}")
        for sequence, entry in self._entries.items():
            if not entry.is_sound():
                raise RuntimeError(f"the pages of sequence {sequence} are not those of its tokens: {entry}")
