"""Attention and cache writes of a recorded forward: one step a layer, with the lengths of its replay.

A batch made for captured rounds tells no lengths to the host, so that attention would run over whole block tables. On a
CPU the host can read them, once a forward."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.kv.write import store
from attention.native.call import Call
from attention.native.library import Library
from attention.paged.batch import AttentionBatch
from attention.paged.reference import paged_attention_reference, visible_keys
from attention.recording import Recorder, Sink


class TightBatch:
    """`source`, which describes a recorded forward, with what its tensors hold in the present replay.

    keys: the slots of the keys, where there is one sequence whose pages are consecutive; else None.
    layers: then each layer's keys `[1, G, L, D]` and values, and their places for the new tokens `[T, G, D]`; None
        for a row that has ended, whose tokens are not stored.
    """

    def __init__(self, source: AttentionBatch):
        self.source = source
        self.keys: slice | None = None
        self.layers: Sequence[tuple[Tensor, ...]] | None = None
        self._batch: AttentionBatch | None = None
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}
        # [layers, slots, G, D], and the same by head
        self._slots = [pages.flatten(1, 2) for pages in (source.cache.key_pages, source.cache.value_pages)]
        self._heads = [slots.transpose(1, 2)[:, None] for slots in self._slots]

    @classmethod
    def of(cls, recorder: Recorder, batch: AttentionBatch) -> "TightBatch":
        """The one that all layers of a part of the cache share in a forward; a step of its own reads the lengths.

        Batches of one forward may differ in what the nodes of their trees see, and in the layers of their cache."""
        key = "tight", id(batch.kv_lengths), id(batch.tree_bits), batch.cache.key_pages.data_ptr()
        if key not in recorder.notes:
            tight = recorder.notes[key] = cls(batch)
            recorder.leaf(tight.read, batch.kv_lengths, batch.slots)
        return recorder.notes[key]

    def read(self) -> None:
        """Read the lengths of this replay."""
        self.keys = self.layers = self._batch = None
        self._masks.clear()
        source, cache = self.source, self.source.cache
        if source.num_sequences > 1:
            return
        length, slots, (pages,) = int(source.kv_lengths), source.slots.tolist(), source.block_tables.tolist()
        count = -(-length // cache.page_size)
        if not 0 < count <= len(pages) or pages[:count] != list(range(pages[0], pages[0] + count)):
            return
        start = pages[0] * cache.page_size
        self.keys = slice(start, start + length)
        new = slice(self.keys.stop - len(slots), self.keys.stop)
        if slots == list(range(new.start, new.stop)):
            held = [heads[:, :, :, self.keys].unbind() for heads in self._heads]
            self.layers = list(zip(*held, *(slots[:, new].unbind() for slots in self._slots), strict=True))

    @property
    def batch(self) -> AttentionBatch:
        """`source` with tight bounds on its lengths."""
        if self._batch is None:
            source = self.source
            lengths = source.kv_lengths.clamp(max=source.max_kv_length).tolist()  # a row's last round may go past it
            counts = source.cu_seqlens_q.diff().tolist()
            self._batch = replace(
                source, max_kv_length=max(1, *lengths), max_query_length=max(1, *counts), run=self.keys,
                uniform=len(set(lengths)) == len(set(counts)) == 1,
                padding=source.padding and int(source.slots.min()) < 0,
            )  # fmt: skip
        return self._batch

    def mask(self, window: int | None, repeats: int) -> Tensor | None:
        """`[R * T, L]`: added to the scores of one sequence's T queries, once for each of R heads; None: nothing is."""
        key = window, repeats
        if key not in self._masks:
            assert self.keys is not None
            source, length = self.source, self.keys.stop - self.keys.start
            if source.tree_bits is None and (window is None or window >= length):
                self._masks[key] = _chain_mask(len(source.positions), repeats, length, source.cache.dtype)
            else:
                visible = visible_keys(self.batch, window, repeats)
                self._masks[key] = None if visible is None else _additive(visible[0, 0], source.cache.dtype)
        return self._masks[key]


def _chain_mask(count: int, repeats: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """`[repeats * count, length]`: -inf where a key comes after the query; the queries are the last `count` tokens."""
    if count == 1:
        return None
    mask = torch.zeros(repeats * count, length, dtype=dtype)
    mask[:, -count:] = _triangle(count, repeats, dtype)
    return mask


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _triangle(count: int, repeats: int, dtype: torch.dtype) -> Tensor:
    return _additive(torch.ones(count, count, dtype=torch.bool).tril(), dtype).repeat(repeats, 1)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


class LayerStep:
    """Stores one layer's new keys and values, and attends.

    query `[T, H, D]`, key `[T, G, D]`, value `[T, G, Dv]`; store_new: False where these are stored already; settings:
    scale, window, softcap and sinks."""

    def __init__(self, tight: TightBatch, layer: int, query: Tensor, key: Tensor, value: Tensor, store_new: bool,
                 settings: tuple):  # fmt: skip
        cache, groups, count = tight.source.cache, key.shape[1], len(query)
        self._tight, self._layer, self._store_new, self._settings = tight, layer, store_new, settings
        self._query, self._key, self._value = query, key, value
        self.out = query.new_empty(*query.shape[:2], value.shape[-1])
        scale, _, softcap, sinks = settings
        self._simple = softcap is None and sinks is None and cache.kv_dtype is None
        self._simple &= query.dtype in (torch.float32, torch.float64)
        self._repeats = query.shape[1] // groups
        # the R query heads of a kv group as rows, so that a group's keys are read once
        by_group = query.unflatten(1, (groups, self._repeats)).permute(1, 2, 0, 3)
        self._from = None if by_group.is_contiguous() else by_group
        self._rows = by_group if self._from is None else by_group.new_empty(by_group.shape)
        self._rows_flat = self._rows.view(1, groups, self._repeats * count, -1)
        self._into = self.out.unflatten(1, (groups, self._repeats)).permute(1, 2, 0, 3)

    def __call__(self) -> None:
        """Run it."""
        tight = self._tight
        if not self._simple or tight.layers is None:
            batch = tight.batch
            if self._store_new:
                store(batch.cache, self._layer, self._key, self._value, batch.slots, padding=batch.padding)
            out = paged_attention_reference(self._query, self._layer, batch, *self._settings)
            assert isinstance(out, Tensor)  # without return_lse
            self.out.copy_(out)
            return
        k, v, new_k, new_v = tight.layers[self._layer]
        if self._store_new:
            new_k.copy_(self._key)
            if not tight.source.cache.values_in_keys:
                new_v.copy_(self._value)
        if self._from is not None:
            self._rows.copy_(self._from)
        scale, window, _, _ = self._settings
        mask = tight.mask(window, self._repeats)
        out = scaled_dot_product_attention(self._rows_flat, k, v, attn_mask=mask, scale=scale)
        self._into.copy_(out.view(self._into.shape))


def record_layer(recorder: Recorder, batch: AttentionBatch, layer: int, query: Tensor, key: Tensor, value: Tensor,
                 *settings, store_new: bool = True) -> Tensor:  # fmt: skip
    """Store and attend as one step: `query [T, H, D]`, `key [T, G, D]`, `value [T, G, Dv]` -> `[T, H, Dv]`.

    settings: scale, window, softcap and sinks, as `paged_attention_reference` takes them; store_new: False where key
    and value are stored already."""
    if recorder.native:
        out = native_layer(recorder, batch, layer, query, key, value, *settings, store_new=store_new)
        if out is not None:
            return out
    tight = TightBatch.of(recorder, batch)
    with recorder.pause():
        step = LayerStep(tight, layer, query, key, value, store_new, settings)
    recorder.leaf(step, query, key, value)
    return step.out


ATTENTION = Library(Path(__file__).with_name("attention_kernel.c"))


def native_layer(sink: Sink, batch: AttentionBatch, layer: int, query: Tensor, key: Tensor, value: Tensor,
                 scale: float, window: int | None, softcap: float | None, sinks: Tensor | None,
                 *, store_new: bool = True) -> Tensor | None:  # fmt: skip
    """Store and attend by one call of a kernel in C, as `record_layer`; None for numbers that it does not take."""
    cache = batch.cache
    numbers = [query, key, value, *(() if sinks is None else (sinks,))]
    if cache.kv_dtype is not None or any(x.dtype != torch.float32 or x.stride(-1) != 1 for x in numbers):
        return None
    trees = (batch.tree_bits, batch.cu_tree_sizes, batch.tree_positions)
    slots = batch.slots if store_new else None
    indices = [batch.block_tables, batch.kv_lengths, batch.cu_seqlens_q, batch.positions, slots, *trees]
    indices = [None if x is None else x.contiguous() for x in indices]
    pages = cache.key_pages[layer], cache.value_pages[layer]
    row, new_value = pages[1].stride(1), None if cache.values_in_keys else value
    with sink.pause():
        out = query.new_empty(*query.shape[:2], value.shape[-1])
    sizes = [len(query), batch.num_sequences, query.shape[1], key.shape[1], query.shape[2], value.shape[2]]
    sizes += [cache.page_size, batch.block_tables.shape[1], 0 if batch.tree_bits is None else batch.tree_bits.shape[1]]
    strides = [stride for x in (query, key, value) for stride in x.stride()[:2]]
    call = Call(
        ATTENTION, "paged_attention", query, key, new_value, out, *pages, *indices, sinks, row, *sizes, *strides,
        window or 0, cache.sinks, float(scale), float(softcap or 0.0),
    )  # fmt: skip
    sink.leaf(call, *numbers, *(x for x in indices if x is not None), outputs=[out])
    return out
