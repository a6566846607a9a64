"""Paged KV cache: the memory that holds keys and values in pages of fixed size, and the moves in it.

The memory is allocated once; sequences take pages as they grow and give them back when they shrink or end (Kwon et al.
2023, PagedAttention). Speculation needs three moves beyond that: append a whole draft tree, commit the accepted path
out of it, truncate. Which pages a sequence owns is in `attention.kv.page_table`."""

import copy
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from attention.gpu import on, to_device
from attention.kv.layout import LatentLayer, LayerLayout
from attention.kv.move import move_rows
from attention.kv.page_format import PageFormat, latent_layer
from attention.kv.page_table import PageTable
from attention.kv.places import Place, assign
from attention.kv.quantization import storage_dtype
from attention.kv.recurrent import RecurrentStates, begin_states
from attention.kv.stats import CacheStats
from attention.kv.window import KeyWindow

DEFAULT_PAGE_SIZE = 128  # tokens: the attention kernel reads a tile of up to this many keys with one page lookup


class PagedKVCache:
    """KV memory of one model, shared by many sequences.

    Shapes: `key_pages [num_layers, num_pages, P, G, D]`, `value_pages [num_layers, num_pages, P, G, Dv]`, P tokens a
    page. Sequences are named by the integers that `add` and `fork` return. Every method checks before it changes
    anything: an error leaves the cache as it was.

    `dtype` is what the model computes in. With `kv_dtype` "int8" or "fp8" (e4m3) the pages hold 8-bit numbers, a half
    or a quarter of the memory, with a float32 scale per token and head beside them: `key_scales` and `value_scales
    [num_layers, num_pages, P, G]`, else None.

    Where a model's layers differ or are on several devices (`for_layout`), `parts` are caches of one page table, one
    for each device and shape of layers, this one first, and `places` says where each layer of the model finds its keys
    and values. `sees`: which tokens a query sees, in every layer (None: what the model says). With `values_in_keys`
    (latents) a value is the first `value_head_dim` numbers of its key: `value_pages` is a view of `key_pages`.
    `states` are those of recurrent layers (None: none); a sequence that is cut before its checkpoint there is emptied.
    `shifts` says of some sequences how far a model's positions are ahead of the places of tokens (M-RoPE after images).

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
        sees: KeyWindow | None = None,
        values_in_keys: bool = False,
    ):
        self.layout = LayerLayout.uniform(num_layers, num_kv_heads, head_dim, value_head_dim)
        if values_in_keys:
            self.layout = LayerLayout(num_layers * (latent_layer(num_kv_heads, head_dim, value_head_dim, kv_dtype),))
        self.values_in_keys = values_in_keys
        self.table = PageTable(num_pages, page_size)
        self.parts: tuple[PagedKVCache, ...] = (self,)
        self.places = tuple(Place(0, number) for number in range(num_layers))
        self.num_layers, self.num_pages, self.page_size = num_layers, num_pages, page_size
        self.dtype, self.kv_dtype, self.sees = dtype, kv_dtype, sees
        self.states: RecurrentStates | None = None
        self.shifts: dict[int, int] = {}
        stored, layer = storage_dtype(kv_dtype, dtype), self.layout.common
        tokens = (num_layers, num_pages, page_size, num_kv_heads)
        flat = lambda pages: [] if pages is None else [of_layer.flatten(0, 1) for of_layer in pages]
        with torch.inference_mode(False):  # the pages outlive the call that makes them
            self.key_pages = torch.empty(*tokens, layer.head_dim, dtype=stored, device=device)
            if values_in_keys:
                self.value_pages = self.key_pages[..., : layer.value_head_dim]
            else:
                self.value_pages = torch.empty(*tokens, layer.value_head_dim, dtype=stored, device=device)
            self.key_scales: Tensor | None = None
            self.value_scales: Tensor | None = None
            if kv_dtype is not None:
                self.key_scales = torch.empty(*tokens, dtype=torch.float32, device=device)
                self.value_scales = torch.empty_like(self.key_scales)
            # the same memory as slots [num_slots, G, D], one view a layer: slot = page * P + offset
            self.key_slots, self.value_slots = flat(self.key_pages), flat(self.value_pages)
            self.key_scale_slots, self.value_scale_slots = flat(self.key_scales), flat(self.value_scales)
            # and once more as [1, G, num_slots, D], for a sequence that is read in place
            self.key_heads = [slots.transpose(0, 1)[None] for slots in self.key_slots]
            self.value_heads = [slots.transpose(0, 1)[None] for slots in self.value_slots]

    @classmethod
    def for_layout(cls, layout: LayerLayout, num_pages: int, page_size: int,
                   devices: Sequence[torch.device] | None = None, cells: int | None = None,
                   **options) -> "PagedKVCache":  # fmt: skip
        """A cache for a model of that `layout`, with `dtype`, `device`, `kv_dtype` and `sees` as `options`.

        devices: of each layer, recurrent ones last, for a model on several; `device`, where inputs belong, is one then.
        cells: sequences that have a recurrent state at the same time (None: as many as there are)."""
        own, count = torch.device(options.pop("device", "cpu")), len(layout.layers)
        of_states = [own] * len(layout.recurrent) if devices is None else devices[count:]
        devices = None if devices is None else devices[:count]
        if devices is None or len({*devices}) == 1:
            devices = [own] * len(layout.layers)
        pools, places = assign(layout, devices, own)  # inputs go to the first part
        sizes = lambda kind: (kind.num_kv_heads, kind.head_dim, kind.value_head_dim)
        parts = [
            cls(count, num_pages, page_size, *sizes(kind), device=device,
                values_in_keys=isinstance(kind, LatentLayer), **options)
            for device, kind, count in pools
        ]  # fmt: skip
        whole = parts[0]
        for part in parts[1:]:
            part.table = whole.table
        whole.parts, whole.places = tuple(parts), tuple(places)
        if layout.recurrent:
            whole.states = RecurrentStates(layout.recurrent, cells, whole.dtype, of_states)
        return whole

    def of_layer(self, layer: int, shared: bool = False) -> "PagedKVCache":
        """The pages of one layer of this part as a cache of one layer: the same memory, for attention to use.

        shared: an earlier layer of the model writes to it."""
        view, one = copy.copy(self), slice(layer, layer + 1)
        view.layout, view.num_layers = LayerLayout(self.layout.layers[one]), 1
        view.parts, view.places = (view,), (Place(0, 0, shared),)
        for name, held in vars(self).items():
            if name.endswith(("_pages", "_scales", "_slots", "_heads")) and isinstance(held, Tensor | list):
                setattr(view, name, held[one])
        return view

    def narrowed(self, window: int | None) -> int | None:
        """The sliding window of a layer whose own is `window`, in tokens (None: none)."""
        if self.sees is None:
            return window
        return self.sees.size if window is None else min(window, self.sees.size)

    @property
    def sinks(self) -> int:
        """The first tokens of a sequence, which no window hides."""
        return 0 if self.sees is None else self.sees.sinks

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self.key_pages.device

    @property
    def free_pages(self) -> int:
        """Pages that `append` can take: those that hold nothing, and those that are kept for reuse only."""
        return self.table.free_pages

    @property
    def format(self) -> PageFormat:
        """What a page holds, for `attention.kv.page_format.pages_within`."""
        return PageFormat(self.layout, self.page_size, self.dtype, self.kv_dtype)

    def stats(self) -> CacheStats:
        """How many pages are free, reusable, owned and shared, and how much of them is wasted."""
        return CacheStats.of_table(self.table, sum(part.format.bytes for part in self.parts))

    @property
    def sequences(self) -> tuple[int, ...]:
        """The live sequences."""
        return self.table.sequences

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens of one sequence fill."""
        return self.table.pages_for(tokens)

    def length(self, sequence: int) -> int:
        """Tokens that `sequence` holds."""
        return self.table.length(sequence)

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The block table of `sequence`: its pages in order; those given back by `free_front` name another one."""
        return self.table.pages(sequence)

    def slots(self, sequence: int, positions: Sequence[int]) -> list[int]:
        """The slot (page * P + offset) of each position of `sequence`."""
        return self.table.slots(sequence, positions)

    def add(self) -> int:
        """Start an empty sequence."""
        return self.table.add()

    def fork(self, sequence: int) -> int:
        """Start a sequence with the same tokens. Pages are shared; `append` and `commit` copy those they write to."""
        if self.states is not None:
            self.states.require_cell(sequence)
        twin = self.table.fork(sequence)
        self.shifts |= {twin: self.shifts[sequence]} if sequence in self.shifts else {}
        if self.states is not None:
            self.states.fork(sequence, twin)
        return twin

    def free(self, sequence: int) -> None:
        """End `sequence` and give back its pages."""
        self.table.free(sequence)
        self.shifts.pop(sequence, None)
        if self.states is not None:
            self.states.release(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of `sequence`, none before its states' checkpoint; give back later pages."""
        length = length if self.states is None else self.states.kept_length(sequence, length)
        self.table.truncate(sequence, length)
        if self.states is not None and not length:
            self.states.release(sequence)

    def free_front(self, sequence: int, committed: int, window: int) -> None:
        """Give back the first pages of `sequence`, of which no token after the first `committed` ones sees any.

        Each token sees the last `window` ones, itself included, in every layer: the largest sliding window of a model
        all of whose layers have one, or the cache's own, whose sinks stay. `committed` counts tokens that stay and
        whose keys and values are written: no drafts. The page that stands for them in the block table is full of such
        tokens, so that implementations may read and then mask it. Raises ValueError for a `committed` that `sequence`
        does not hold."""
        self.table.free_front(sequence, committed, window, self.sinks)

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Grow each sequence by its count of tokens, whose slots the next forward fills.

        A last page that a fork shares is copied first, so that writing to it reaches no other sequence. Raises
        OutOfPages, before any sequence has grown."""
        with begin_states(self.states, sequences, map(self.table.length, sequences)):
            self._copy_pages(self.table.append(sequences, counts))

    def extend_to(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Grow each sequence that is shorter than its length, to the end of a page, so that the next calls find room.

        For rounds that append on the device. Raises OutOfPages, before any sequence has grown."""
        held = map(self.table.length, sequences)
        short = [
            (sequence, self.pages_for(length) * self.page_size - has)
            for sequence, length, has in zip(sequences, lengths, held, strict=True)
            if has < length
        ]
        if short:
            self.append(*zip(*short, strict=True))

    def commit(self, sequences: Sequence[int], starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Of the tokens from position `start` on keep only those of `path`, increasing offsets, and close the gaps.

        Keys are stored rotated and a node's position is prefix length + depth, so they move without being rotated
        again. Raises ValueError for a path that is not increasing or leaves the sequence, and OutOfPages where a page
        that a fork shares must be copied and cannot be; nothing has moved then."""
        if self.states is not None:
            self.states.require_paths(sequences, starts)
        copies, moves = self.table.commit(sequences, starts, paths)
        if self.states is not None:
            self.states.commit(sequences, starts, paths)
        self._copy_pages(copies)
        self._move(moves, self.num_pages * self.page_size)

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        self._move([[one] for one in copies], self.num_pages)

    def _move(self, segments: Sequence[Sequence[tuple[int, int]]], rows: int) -> None:
        """Make the moves (source, target) of each segment in all layers; `rows` as in `move`."""
        moves = [move for segment in segments for move in segment]
        if not moves:
            return
        cu_moves = [0, *accumulate(len(segment) for segment in segments)]
        packed = torch.tensor([source for source, _ in moves] + [target for _, target in moves] + cu_moves)
        for device in dict.fromkeys(part.device for part in self.parts):
            with on(device):
                sources, targets, borders = to_device(packed, device).split([len(moves)] * 2 + [len(cu_moves)])
                self.move(sources, targets, borders, rows)

    def move(self, sources: Tensor, targets: Tensor, cu_moves: Tensor, rows: int) -> None:
        """Run `attention.kv.move.move_rows` over all that the pages of the parts on the tensors' device hold.

        `rows` is the number of slots (num_pages * P) or of pages (num_pages), whichever is moved; reference counts are
        ignored."""
        for part in self.parts:
            if part.device == sources.device:
                values = None if part.values_in_keys else part.value_pages
                held = part.key_pages, values, part.key_scales, part.value_scales
                stored = [pages.view(pages.shape[0], rows, -1) for pages in held if pages is not None]
                move_rows(stored, sources, targets, cu_moves)
