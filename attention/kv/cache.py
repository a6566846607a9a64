"""Paged KV cache: keys and values live in fixed-size pages, and a block table per sequence says which pages, in order.

The memory is allocated once; sequences take pages as they grow and give them back when they shrink or end (Kwon et al.
2023, PagedAttention). Speculation needs three moves beyond that: append a whole draft tree, commit the accepted path
out of it, truncate."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from attention.kv.move import move_rows
from attention.kv.quantization import storage_dtype

DEFAULT_PAGE_SIZE = 128  # tokens: the attention kernel reads a tile of up to this many keys with one page lookup


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than a request needs. Nothing was allocated or freed when it is raised."""


@dataclass(slots=True)
class _Entry:
    """One sequence: its pages in order and how many tokens they hold."""

    pages: list[int]
    length: int = 0


class PagedKVCache:
    """KV memory of one model, shared by many sequences.

    Shapes: `key_pages [num_layers, num_pages, P, G, D]`, `value_pages [num_layers, num_pages, P, G, Dv]`, P tokens a
    page. Sequences are named by the integers that `add` and `fork` return. Every method checks before it changes: an
    error leaves the cache as it was.

    `dtype` is what the model computes in. With `kv_dtype` "int8" or "fp8" (e4m3) the pages hold 8-bit numbers, a half
    or a quarter of the memory, with a float32 scale per token and head beside them: `key_scales` and `value_scales
    [num_layers, num_pages, P, G]`, else None.

    >>> cache = PagedKVCache(num_layers=2, num_pages=8, page_size=4, num_kv_heads=1, head_dim=64)
    >>> sequence = cache.add()
    >>> cache.append([sequence], [6])
    >>> cache.length(sequence), cache.free_pages
    (6, 6)
    >>> cache.truncate(sequence, 3)
    >>> cache.free(sequence)
    >>> cache.free_pages
    8
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_dtype: str | None = None,
    ):
        sizes = dict(
            num_layers=num_layers,
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_layers = num_layers
        self.page_size = page_size
        self.num_pages = num_pages
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        stored = storage_dtype(kv_dtype, dtype)
        tokens = (num_layers, num_pages, page_size, num_kv_heads)
        with torch.inference_mode(False):  # the pages outlive the call that makes them
            self.key_pages = torch.empty(*tokens, head_dim, dtype=stored, device=device)
            self.value_pages = torch.empty(*tokens, value_head_dim or head_dim, dtype=stored, device=device)
            self.key_scales = self.value_scales = None
            if kv_dtype is not None:
                self.key_scales, self.value_scales = (
                    torch.empty(*tokens, dtype=torch.float32, device=device) for _ in range(2)
                )
                self.key_scale_slots = [scales.flatten(0, 1) for scales in self.key_scales]
                self.value_scale_slots = [scales.flatten(0, 1) for scales in self.value_scales]
            # the same memory as slots [num_slots, G, D], one view a layer: slot = page * P + offset
            self.key_slots = [pages.flatten(0, 1) for pages in self.key_pages]
            self.value_slots = [pages.flatten(0, 1) for pages in self.value_pages]
            # and once more as [1, G, num_slots, D], for a sequence that is read in place
            self.key_heads = [slots.transpose(0, 1)[None] for slots in self.key_slots]
            self.value_heads = [slots.transpose(0, 1)[None] for slots in self.value_slots]
        self._entries: dict[int, _Entry] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages  # sequences that hold each page; more than one after a fork
        self._next = 0

    def of_layer(self, layer: int) -> "PagedKVCache":
        """The pages of one layer as a cache of one layer: the same memory, for attention to read and write."""
        view, one = copy.copy(self), slice(layer, layer + 1)
        view.num_layers = 1
        for name, held in vars(self).items():
            if name.endswith(("_pages", "_scales", "_slots", "_heads")) and isinstance(held, Tensor | list):
                setattr(view, name, held[one])
        return view

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self.key_pages.device

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The live sequences."""
        return tuple(self._entries)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence fill."""
        return -(-tokens // self.page_size)

    def _entry(self, sequence: int) -> _Entry:
        if sequence not in self._entries:
            raise KeyError(f"sequence {sequence} is not in the cache; live sequences: {list(self._entries)}")
        return self._entries[sequence]

    def length(self, sequence: int) -> int:
        """Tokens that `sequence` holds."""
        return self._entry(sequence).length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The block table of `sequence`: its pages in order."""
        return tuple(self._entry(sequence).pages)

    def add(self) -> int:
        """A new empty sequence."""
        self._next += 1
        self._entries[self._next] = _Entry([])
        return self._next

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Grow each sequence by its count of tokens, whose slots the next forward fills. Raises OutOfPages, all or
        nothing.

        A last page that a fork shares is copied first, so writing never reaches another sequence.
        """
        if len(set(sequences)) != len(sequences) or len(sequences) != len(counts) or min(counts, default=0) < 0:
            raise ValueError(
                f"sequences must be distinct with one count >= 0 each, got {list(sequences)} and {list(counts)}"
            )
        entries = [self._entry(s) for s in sequences]
        written = [
            (e, {len(e.pages) - 1}) for e, c in zip(entries, counts, strict=True) if c and e.length % self.page_size
        ]
        fresh = [self.pages_for(e.length + c) - len(e.pages) for e, c in zip(entries, counts, strict=True)]
        self._make_writable(written, sum(fresh), f"append {sum(counts)} tokens to {len(entries)} sequences")
        for entry, count, new in zip(entries, counts, fresh, strict=True):
            entry.pages += [self._take() for _ in range(new)]
            entry.length += count

    def _make_writable(self, written: Sequence[tuple[_Entry, set[int]]], fresh: int, purpose: str) -> None:
        """Copy those pages (by index in the block table) that another sequence holds too; check first that copies and
        `fresh` pages fit.
        """
        shared = [(entry, i) for entry, indices in written for i in indices if self._owners[entry.pages[i]] > 1]
        writers = Counter(entry.pages[i] for entry, i in shared)
        copies = sum(
            min(n, self._owners[page] - 1) for page, n in writers.items()
        )  # the last holder of a page keeps it
        if copies + fresh > len(self._free):
            raise OutOfPages(
                f"{copies + fresh} pages of {self.page_size} tokens are needed to {purpose}, but "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        moves = []
        for entry, i in shared:
            old = entry.pages[i]
            if self._owners[old] > 1:
                entry.pages[i] = self._take()
                moves.append([(old, entry.pages[i])])
                self._drop(old)
        self._move(moves, self.num_pages)

    def _move(self, segments: Sequence[Sequence[tuple[int, int]]], rows: int) -> None:
        """Move (source, target) rows in all layers: `rows` says whether slots (num_pages * P) or whole pages
        (num_pages) are meant.
        """
        moves = [move for segment in segments for move in segment]
        if not moves:
            return
        cumulative = [0, *accumulate(len(segment) for segment in segments)]
        whole = torch.tensor([source for source, _ in moves] + [target for _, target in moves] + cumulative).to(
            self.device, non_blocking=True
        )
        self.move(*whole.split([len(moves), len(moves), len(cumulative)]), rows)

    def move(self, sources: Tensor, targets: Tensor, cu_moves: Tensor, rows: int) -> None:
        """`attention.kv.move.move_rows` over all that the pages hold, `rows` as the number of slots or of pages; owners
        are not asked.
        """
        stored = [t for t in (self.key_pages, self.value_pages, self.key_scales, self.value_scales) if t is not None]
        move_rows([t.view(t.shape[0], rows, -1) for t in stored], sources, targets, cu_moves)

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free.append(page)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of `sequence` and give back the pages behind them."""
        entry = self._entry(sequence)
        if not 0 <= length <= entry.length:
            raise ValueError(f"sequence {sequence} holds {entry.length} tokens and cannot be truncated to {length}")
        keep = self.pages_for(length)
        for page in reversed(entry.pages[keep:]):  # the next sequence then takes them in rising order
            self._drop(page)
        del entry.pages[keep:]
        entry.length = length

    def commit(self, sequences: Sequence[int], starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Keep, of the tokens behind position `start`, only those of `path` (increasing offsets from `start`), and
        close the gaps.

        Keys are stored rotated and a node's position is prefix length + depth, so its entry moves without being rotated
        again. Raises ValueError when a path is not increasing or leaves the sequence, OutOfPages when a page that a
        fork shares must be copied and cannot be; nothing has moved then."""
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences must be distinct, got {list(sequences)}")
        moves = []
        for sequence, start, path in zip(sequences, starts, paths, strict=True):
            length = self.length(sequence)
            inside = 0 <= start <= length and (not path or 0 <= path[0] <= path[-1] < length - start)
            if not inside or any(b <= a for a, b in zip(path, path[1:], strict=False)):
                raise ValueError(f"path {list(path)} from {start} is not an increasing path inside {length} tokens")
            moves.append([(start + offset, start + i) for i, offset in enumerate(path) if offset != i])
        if any(moves):
            written = [
                (self._entry(s), {target // self.page_size for _, target in m})
                for s, m in zip(sequences, moves, strict=True)
            ]
            self._make_writable(written, 0, f"commit paths of {len(moves)} sequences")
            slots = [[tuple(self.slots(s, move)) for move in m] for s, m in zip(sequences, moves, strict=True)]
            self._move(slots, self.num_pages * self.page_size)
        for sequence, start, path in zip(sequences, starts, paths, strict=True):
            self.truncate(sequence, start + len(path))

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Pages are shared; the first that either side writes to is copied by
        `append`.
        """
        entry = self._entry(sequence)
        twin = self.add()
        self._entries[twin] = _Entry(list(entry.pages), entry.length)
        for page in entry.pages:
            self._owners[page] += 1
        return twin

    def free(self, sequence: int) -> None:
        """End `sequence` and give back its pages."""
        self.truncate(sequence, 0)
        del self._entries[sequence]

    def slots(self, sequence: int, positions: Sequence[int]) -> list[int]:
        """Slot (page * P + offset) of each position of `sequence`."""
        entry, size = self._entry(sequence), self.page_size
        pages = entry.pages
        if len(positions) and not 0 <= min(positions) <= max(positions) < entry.length:
            raise ValueError(
                f"sequence {sequence} holds {entry.length} tokens, not positions {min(positions)} to {max(positions)}"
            )
        return [pages[p // size] * size + p % size for p in positions]
