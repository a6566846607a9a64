"""Prefixes that a new sequence may share: blocks of tokens, found by a hash of the whole text up to their end.

A block is one full page in each of several page tables (the target's, draft models'), so that whoever reuses a text has
everything that was computed for it. Blocks whose pages are needed for other tokens disappear, the least recently
released first (Kwon et al. 2023, section 4.4; hashes chained over blocks as in vLLM's automatic prefix caching)."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

from attention.kv.integrity import checked
from attention.kv.page_table import PageTable

KEY_BYTES = 16  # two texts of 2^40 blocks in all share a key with a probability of 2^-49


def block_keys(tokens: Sequence[int], page_size: int, extras: Sequence[str | bytes | int] = (),
               before: bytes | None = None) -> list[bytes]:  # fmt: skip
    """A key of each full page of `tokens`: a digest of the key before it, its tokens, and `extras`.

    `extras` is what else keys and values depend on: an adapter, the content of images, a fingerprint of the weights.
    `before` is the key of the full page that `tokens` follow (None: they start the text).
    Raises ValueError for a `page_size` below 1, TypeError for an extra of another type.

    >>> keys = block_keys([5, 6, 7, 8, 9], page_size=2)
    >>> len(keys), keys[0].hex()
    (2, 'adf0f8948230d421a9af2b48ed1d8ff9')
    >>> keys[:1] == block_keys([5, 6, 0], 2), keys[1] == block_keys([7, 8], 2)[0]
    (True, False)
    >>> block_keys([7, 8], 2, before=keys[0]) == keys[1:]
    True
    >>> block_keys([5, 6], 2, extras=("an adapter",)) == keys[:1]
    False
    """
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}")
    suffix, key, keys = b"".join(map(_encoded, extras)), before or bytes(KEY_BYTES), []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        numbers = struct.pack(f"<{page_size}q", *tokens[start : start + page_size])
        key = blake2b(key + numbers + suffix, digest_size=KEY_BYTES).digest()
        keys.append(key)
    return keys


def _encoded(extra: str | bytes | int) -> bytes:
    """`extra` with its type and its length before it, so that no two lists of extras have the same bytes."""
    if isinstance(extra, str):
        kind, content = b"s", extra.encode("utf-8", "surrogatepass")
    elif isinstance(extra, bytes):
        kind, content = b"b", extra
    elif isinstance(extra, int):
        kind, content = b"i", hex(extra).encode()
    else:
        raise TypeError(f"extras must be str, bytes or int, got {extra!r}")
    return kind + len(content).to_bytes(8, "little") + content


@dataclass(slots=True)
class _Block:
    """One block: its page in every table, the key before it (None at the start of a text) and the keys after it."""

    pages: tuple[int, ...]
    before: bytes | None
    after: set[bytes] = field(default_factory=set)


class PrefixIndex:
    """Blocks by their keys, over one or several page tables of equal page size.

    Methods take one sequence of each table, and keys from the start of their text as `block_keys` gives them. A block
    is known only together with all blocks before it: when it is lost in one table, it and what follows it is forgotten
    in all. Every method checks before it changes anything.

    Register a block as soon as its forward is scheduled, and other sequences can share it in the same step; `forget`
    what a failed forward did not write. Weights that change need `flush`, as does an index that is no longer used.

    >>> table = PageTable(num_pages=4, page_size=2)
    >>> index, keys, first = PrefixIndex([table]), block_keys([5, 6, 7, 8, 9], 2), table.add()
    >>> table.append([first], [5])
    []
    >>> index.register([first], keys) == keys
    True
    >>> table.free(first)
    >>> second = table.add()
    >>> index.extend([second], block_keys([5, 6, 7, 8, 1, 2], 2))
    2
    >>> table.pages(second), table.length(second), len(index)
    ((0, 1), 4, 2)
    """

    def __init__(self, tables: Sequence[PageTable]):
        sizes = [table.page_size for table in tables]
        if len(set(map(id, tables))) != len(tables) or len(set(sizes)) != 1:
            raise ValueError(f"one or several different tables of equal page size are needed, got sizes {sizes}")
        self.tables, self.page_size = tuple(tables), sizes[0]
        self._blocks: dict[bytes, _Block] = {}
        self._keys: list[dict[int, bytes]] = [{} for _ in tables]  # of each table: registered page -> its key

    def __len__(self) -> int:
        """Known blocks."""
        return len(self._blocks)

    @property
    def debug(self) -> bool:
        """Whether every change ends with `check_integrity`: where that of a table does."""
        return any(table.debug for table in self.tables)

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of `keys` are known, counted from the first to the first unknown one."""
        return next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))

    def freed(self, sequences: Sequence[int]) -> int:
        """How many blocks at the start of `sequences` have a page that was given back (`PageTable.free_front`)."""
        return max(table.freed_pages(sequence) for table, sequence in zip(self.tables, sequences, strict=True))

    @checked
    def register(self, sequences: Sequence[int], keys: Sequence[bytes]) -> list[bytes]:
        """Enter the first pages of `sequences` under `keys`, where these are not known, and return the new keys.

        Raises ValueError for sequences with fewer full pages than keys, for a new block whose page has been given back
        (`PageTable.free_front`), and for a page registered under another key."""
        lengths = self._lengths(sequences, keys)
        if min(lengths) < len(keys) * self.page_size:
            raise ValueError(f"{len(keys)} keys need as many full pages of {self.page_size}, got lengths {lengths}")
        known, freed = self.known(keys), self.freed(sequences)
        if known < min(freed, len(keys)):
            raise ValueError(f"the pages of the first {freed} blocks are given back, and only {known} are known")
        tables = [table.pages(sequence) for table, sequence in zip(self.tables, sequences, strict=True)]
        blocks = zip(keys, [None, *keys], zip(*tables, strict=False), strict=False)
        new = [(key, _Block(pages, before)) for key, before, pages in blocks if key not in self._blocks]
        for key, block in new:
            if any(table.is_registered(page) for table, page in zip(self.tables, block.pages, strict=True)):
                raise ValueError(f"a page of {block.pages} is registered already, but not as block {key.hex()}")
        for key, block in new:
            self._blocks[key] = block
            if block.before is not None:
                self._blocks[block.before].after.add(key)
            for i, page in enumerate(block.pages):
                self._keys[i][page] = key
                self.tables[i].register(page, partial(self._lost, i))
        return [key for key, _ in new]

    @checked
    def extend(self, sequences: Sequence[int], keys: Sequence[bytes]) -> int:
        """Let `sequences` take over the known blocks that follow theirs, and return how many blocks they hold then.

        They must hold the same whole number of blocks, those of the first of `keys`: else ValueError. Whoever needs
        logits leaves out the key of a last token."""
        lengths = self._lengths(sequences, keys)
        if len(set(lengths)) != 1 or lengths[0] % self.page_size:
            raise ValueError(f"sequences must hold equally many full pages of {self.page_size}, got lengths {lengths}")
        held, known = lengths[0] // self.page_size, self.known(keys)
        found = [self._blocks[key].pages for key in keys[held:known]]
        taken = list(zip(self.tables, sequences, zip(*found, strict=True), strict=True)) if found else []
        for table, sequence, pages in taken:
            if not {*table.pages(sequence)}.isdisjoint(pages):
                raise ValueError(f"the pages {pages} of the next blocks are in sequence {sequence} already")
        for table, sequence, pages in taken:
            table.take_over(sequence, pages)
        return held + len(found)

    @checked
    def forget(self, keys: Sequence[bytes]) -> None:
        """Forget those of `keys` that are known and all blocks after them: their forward failed.

        Sequences that took them over hold pages without contents and must be truncated."""
        for key in keys:
            if key in self._blocks:
                self._drop(key)

    @checked
    def flush(self) -> None:
        """Forget all blocks. Pages without an owner become blank."""
        self.forget([key for key, block in self._blocks.items() if block.before is None])

    def _lengths(self, sequences: Sequence[int], keys: Sequence[bytes]) -> list[int]:
        """The lengths of `sequences`. Raises ValueError for another number of them, or keys that repeat."""
        if len(sequences) != len(self.tables) or len(set(keys)) != len(keys):
            raise ValueError(
                f"one sequence of each of {len(self.tables)} tables and different keys are needed, got sequences "
                f"{list(sequences)} and {len(keys)} keys, {len(set(keys))} different"
            )
        return [table.length(sequence) for table, sequence in zip(self.tables, sequences, strict=True)]

    def _lost(self, table: int, page: int) -> None:
        """Forget the block of a page that `table` is about to give other contents."""
        self._drop(self._keys[table].pop(page))

    def _drop(self, key: bytes) -> None:
        """Forget a block and all after it, in every table."""
        before = self._blocks[key].before
        if before is not None:
            self._blocks[before].after.remove(key)
        dropped = [key]
        while dropped:
            block = self._blocks.pop(dropped.pop())
            dropped += block.after
            for table, keys, page in zip(self.tables, self._keys, block.pages, strict=True):
                if keys.pop(page, None) is not None:  # a lost page is unregistered already
                    table.unregister(page)

    def check_integrity(self) -> None:
        """Raise RuntimeError where the blocks, their order and what the tables have registered disagree."""
        for i, (table, keys) in enumerate(zip(self.tables, self._keys, strict=True)):
            if keys != {block.pages[i]: key for key, block in self._blocks.items()} or len(keys) != len(self._blocks):
                raise RuntimeError(f"the pages {sorted(keys)} of table {i} are not those of {len(self._blocks)} blocks")
            if lost := [page for page in keys if not table.is_registered(page)]:
                raise RuntimeError(f"the pages {lost} of blocks are not registered in table {i}")
        links = {(block.before, key) for key, block in self._blocks.items() if block.before is not None}
        if links != {(key, after) for key, block in self._blocks.items() for after in block.after}:
            raise RuntimeError("a block is known without the one before it, or with others after it than follow it")
