"""Describes one packed forward over sequences of the cache: lengths, positions, slots, block tables, tree masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from attention.gpu import to_device
from attention.kv.cache import PagedKVCache
from attention.kv.places import Place
from attention.recurrent.batch import DeviceRecurrentBatch, RecurrentBatch

# in their order in memory; the last three only where there are trees
TENSORS = ("block_tables", "kv_lengths", "cu_seqlens_q", "positions", "slots",
           "tree_bits", "cu_tree_sizes", "tree_positions")  # fmt: skip
# depths and `ancestor_bits` of a tree's nodes, as lists, or as tensors [M] and [M, W] on the device
HostTree = tuple[Sequence[int], Sequence[Sequence[int]]]
Tree = HostTree | tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """B sequences whose T new tokens are packed one after the other; keys 0 … L - 1 include those new tokens.

    The last tokens of a sequence may be the nodes of a token tree. `tree_bits [T, W]` says which nodes each token sees:
    bit n % 64 of word n // 64 is node n. The first nodes may be in the cache already; the new tokens are then the last
    nodes. All tensors are int64 on the cache's device. `max_query_length` is an upper bound: a CUDA graph captured with
    a batch may be replayed with other lengths up to it; tokens after the last sequence's end get no output. Raises
    ValueError for a tensor that is not contiguous: kernels compute addresses from shapes."""

    cache: PagedKVCache
    block_tables: Tensor  # [B, max pages], padded with page 0
    kv_lengths: Tensor  # [B]
    cu_seqlens_q: Tensor  # [B + 1]
    positions: Tensor  # [T], index in the sequence, or prefix length + depth for a tree node
    slots: Tensor  # [T], where each new token's key and value go
    max_query_length: int
    max_kv_length: int
    uniform: bool  # every sequence has the same number of new tokens and of keys
    run: slice | None = None  # the slots of the keys, where B = 1 and its pages are consecutive
    tree_bits: Tensor | None = None
    cu_tree_sizes: Tensor | None = None  # [B + 1], nodes of the sequences before each; some may have no tree
    tree_positions: Tensor | None = None  # [nodes of all trees]
    padding: bool = False  # slots may be negative: those tokens are not stored
    tail: bool = False  # there may be tokens after the last sequence's end
    recurrent: RecurrentBatch | DeviceRecurrentBatch | None = None  # where the cache keeps recurrent states
    shifts: Tensor | None = None  # [B], `PagedKVCache.shifts`; None: all are 0
    _derived: dict = field(default_factory=dict, init=False)  # masks and indices shared by all layers

    def __post_init__(self):
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got {list(tensor.shape)} with strides {tensor.stride()}")

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.kv_lengths.shape[0]

    @property
    def shifted_positions(self) -> Tensor:
        """`[T]`: positions as the model counts them, each with the shift of its sequence; of padding any from 0 on."""
        if self.shifts is None:
            return self.positions
        token = torch.arange(self.positions.shape[0], device=self.positions.device)
        row = torch.searchsorted(self.cu_seqlens_q[1:], token, right=True)
        return (self.positions + self.shifts[row.clamp(max=self.num_sequences - 1)]).clamp(min=0)

    def of_layer(self, layer: int) -> "AttentionBatch":
        """The same over the pages of one layer of the model."""
        batch, place = self.at(layer)
        return replace(batch, cache=batch.cache.of_layer(place.layer, place.shared))

    def at(self, layer: int) -> tuple["AttentionBatch", Place]:
        """The same over the part of the cache that has a layer of the model, on its device, and the place there."""
        place = self.cache.places[layer]
        return (self if place.part == 0 else self.derived(place.part, lambda batch: batch._over(place.part))), place

    def _over(self, number: int) -> "AttentionBatch":
        """The same over a part of the cache, on its device."""
        part = self.cache.parts[number]
        held = {name: getattr(self, name) for name in TENSORS}
        moved: dict[str, Any] = {name: None if x is None else x.to(part.device) for name, x in held.items()}
        return replace(self, cache=part, **moved)

    def forget(self) -> None:
        """Drop what was derived, after the tensors have changed in place."""
        self._derived.clear()

    def derived(self, name, compute):
        """`compute(self)`, computed once for all layers of a forward."""
        if name not in self._derived:
            self._derived[name] = compute(self)
        return self._derived[name]


def ancestor_bits(parents: Sequence[int | None]) -> list[list[int]]:
    """For each node the nodes it sees, its ancestors and itself, as int64 words.

    `parents[0]` is None, and a parent comes before its children.

    >>> ancestor_bits([None, 0, 0, 1])
    [[1], [3], [5], [11]]
    """
    seen: list[int] = []
    for node, parent in enumerate(parents):
        seen.append((0 if parent is None else seen[parent]) | 1 << node)
    words = -(-len(parents) // 64)
    as_int64 = lambda word: word - (1 << 64) if word >> 63 else word
    return [[as_int64(bits >> 64 * w & (1 << 64) - 1) for w in range(words)] for bits in seen]


def build_batch(
    cache: PagedKVCache,
    sequences: Sequence[int],
    query_lengths: Sequence[int],
    trees: Sequence[Tree | None] | tuple[Tensor, Tensor] | None = None,
) -> AttentionBatch:
    """Describe a forward over the last `query_lengths` tokens of `sequences`, which `cache.append` has made room for.

    `trees` holds, for every sequence, None or the token tree that is its tail: (depths, `ancestor_bits`) of the nodes,
    of which the new tokens may be the last few only. Where all are on the device and of M nodes, they may be a pair of
    tensors, depths `[B, M]` and bits `[B, M, W]`. Raises ValueError for a query that is empty or longer than its
    sequence, and for a sequence shorter than its tree."""
    on_host, on_device = _told_apart([None] * len(sequences) if trees is None else trees)
    parts, words = _describe(cache, sequences, query_lengths, on_host)
    # one tensor, one copy to the device, cut into views
    whole = to_device(torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64), cache.device)
    pages, lengths = parts[:2]
    states, shifts = cache.states, shifts_of(cache, sequences)
    first, width = pages[0], len(pages) // len(sequences)
    consecutive = len(sequences) == 1 and pages == list(range(first, first + width))
    batch = AttentionBatch(
        cache=cache,
        **_views(whole, [len(part) for part in parts], width, words),
        max_query_length=max(query_lengths),
        max_kv_length=max(lengths),
        uniform=len(set(query_lengths)) == 1 and len(set(lengths)) == 1,
        run=slice(first * cache.page_size, first * cache.page_size + lengths[0]) if consecutive else None,
        recurrent=None if states is None else RecurrentBatch(states, sequences, lengths, query_lengths, trees),
        shifts=to_device(torch.tensor(shifts), cache.device) if any(shifts) else None,
    )
    for first, depths, bits in on_device:
        before = parts[-2][first]  # nodes of the sequences before
        _add_trees(batch, first, before, depths, torch.nn.functional.pad(bits, (0, words - bits.shape[2])))
    return batch


def shifts_of(cache: PagedKVCache, sequences: Sequence[int]) -> list[int]:
    """The shift of each sequence, see `PagedKVCache.shifts`."""
    return [cache.shifts.get(sequence, 0) for sequence in sequences] if cache.shifts else [0] * len(sequences)


def _told_apart(
    trees: Sequence[Tree | None] | tuple[Tensor, Tensor],
) -> tuple[list[HostTree | None], list[tuple[int, Tensor, Tensor]]]:
    """The trees that the host knows, and others as trees of zeros; then those on the device of M nodes, run by run.

    A run is the first sequence, depths `[b, M]` and bits `[b, M, W]` of sequences that follow each other."""
    blank = lambda nodes, words: ([0] * nodes, [[0] * words] * nodes)
    if isinstance(trees, tuple) and isinstance(trees[0], Tensor):
        depths, bits = trees
        return [blank(*bits.shape[1:])] * len(bits), [(0, depths, bits)]  # type: ignore[union-attr, list-item]
    on_host: list[HostTree | None] = []
    runs = []
    shape_of = lambda tree: tree[1].shape if tree is not None and isinstance(tree[1], Tensor) else None
    for shape, group in groupby(trees, shape_of):
        run: list = list(group)
        if shape is not None:
            depths, bits = (torch.stack(each) for each in zip(*run, strict=True))
            runs.append((len(on_host), depths, bits))
        on_host += run if shape is None else [blank(*shape)] * len(run)
    return on_host, runs


def _describe(cache: PagedKVCache, sequences: Sequence[int], query_lengths: Sequence[int],
              trees: Sequence[HostTree | None] | None, width: int = 0) -> tuple[list[list[int]], int]:  # fmt: skip
    """The tensors of a batch as flat lists, in the order of TENSORS, and the words of a node's bits.

    Block tables have at least `width` columns."""
    trees = [None] * len(sequences) if trees is None else trees
    if not sequences or len(trees) != len(sequences):
        raise ValueError(
            f"a batch needs sequences and one tree or None for each, got {len(sequences)} sequences and {len(trees)} "
            "trees"
        )
    words = max((len(tree[1][0]) for tree in trees if tree), default=0)
    lengths = [cache.length(s) for s in sequences]
    positions, slots, cu_seqlens, bit_rows, tree_positions, cu_tree_sizes = [], [], [0], [], [], [0]
    for sequence, new, length, tree in zip(sequences, query_lengths, lengths, trees, strict=True):
        depths, bits = tree or ((), ())
        nodes, first_node = len(depths), length - len(depths)
        if len(bits) != nodes or not 1 <= new <= length or first_node < 0:
            raise ValueError(
                f"sequence {sequence} of {length} tokens cannot have {new} query tokens with a tree of {nodes} nodes "
                f"and {len(bits)} bit rows"
            )
        in_tree = min(new, nodes)
        plain = range(length - new, length - in_tree)
        node_positions = [first_node + depth for depth in depths]
        positions += [*plain, *node_positions[nodes - in_tree :]]
        slots += cache.slots(sequence, range(length - new, length))
        cu_seqlens.append(cu_seqlens[-1] + new)
        if words:
            tree_positions += node_positions
            cu_tree_sizes.append(cu_tree_sizes[-1] + nodes)
            bit_rows += [0] * (len(plain) * words)
            bit_rows += [word for row in bits[nodes - in_tree :] for word in (*row, *[0] * (words - len(row)))]
    tables = [cache.pages(s) for s in sequences]
    width = max(width, *(len(table) for table in tables))
    pages = [page for table in tables for page in (*table, *[0] * (width - len(table)))]
    parts = [pages, lengths, cu_seqlens, positions, slots]
    return parts + ([bit_rows, cu_tree_sizes, tree_positions] if words else []), words


def _views(whole: Tensor, sizes: Sequence[int], width: int, words: int) -> dict[str, Any]:
    """The tensors of a batch, cut out of `whole`, in which they follow each other."""
    found = dict(zip(TENSORS, whole.split(list(sizes)), strict=False))
    shapes = {"block_tables": width} | ({"tree_bits": words} if words else {})
    return found | {name: found[name].view(-1, columns) for name, columns in shapes.items()}


class StaticBatch:
    """A `batch` whose tensors keep their addresses while `load` fills them: what a CUDA graph of a forward reads.

    It has up to `num_sequences` sequences of up to `num_pages` pages, `num_nodes` tree nodes in all with `words` words
    each, and up to `num_tokens` new tokens; those after the last sequence's end are padding and not stored."""

    def __init__(self, cache: PagedKVCache, num_sequences: int, num_tokens: int, num_pages: int, words: int = 0,
                 num_nodes: int = 0):  # fmt: skip
        self._num_pages, self._shifted = num_pages, False
        self._sizes = [num_sequences * num_pages, num_sequences, num_sequences + 1, num_tokens, num_tokens]
        self._sizes += [num_tokens * words, num_sequences + 1, num_nodes] if words else []
        with torch.inference_mode(False):  # it outlives the call that makes it
            self._whole = torch.zeros(sum(self._sizes), dtype=torch.int64, device=cache.device)
            self._shifts = torch.zeros(num_sequences, dtype=torch.int64, device=cache.device)
        tensors = _views(self._whole, self._sizes, num_pages, words)
        tensors["slots"].fill_(-1)  # until the first `load`, sequences are empty and nothing is stored
        self.batch = AttentionBatch(
            cache, **tensors, max_query_length=num_tokens, max_kv_length=num_pages * cache.page_size, uniform=False,
            padding=True, tail=True, shifts=self._shifts,
        )  # fmt: skip

    def load(self, sequences: Sequence[int], query_lengths: Sequence[int],
             trees: Sequence[HostTree] | None = None) -> None:  # fmt: skip
        """Describe other sequences in place, as `build_batch` does; those that are lacking have no tokens."""
        parts, _ = _describe(self.batch.cache, sequences, query_lengths, trees, self._num_pages)
        padded: list[int] = []
        for part, size, name in zip(parts, self._sizes, TENSORS, strict=False):
            padded += part
            filling = {"slots": -1, "cu_seqlens_q": part[-1], "cu_tree_sizes": part[-1]}.get(name, 0)
            padded += [filling] * (size - len(part))
        self._whole.copy_(to_device(torch.tensor(padded), self._whole.device))
        shifts = shifts_of(self.batch.cache, sequences)
        if any(shifts) or self._shifted:
            padding = [0] * (len(self._shifts) - len(shifts))
            self._shifts.copy_(to_device(torch.tensor(shifts + padding), self._shifts.device))
        self._shifted = any(shifts)


def _add_trees(batch: AttentionBatch, first: int, before: int, depths: Tensor, bits: Tensor) -> None:
    """Add trees on the device, `[b, M]` and `[b, M, W]`, to a batch that was made with depths and bits of zero.

    They are those of the sequences from `first` on, which follow `before` nodes of other sequences."""
    assert batch.tree_positions is not None and batch.tree_bits is not None
    count, nodes = depths.shape
    batch.tree_positions[before : before + count * nodes].add_(depths.flatten())
    starts = batch.cu_seqlens_q[first : first + count + 1]
    place = torch.arange(-depths.shape[1], 0, device=depths.device)
    token = starts[1:, None] + place  # [b, M], index of each node among the packed tokens
    new = token >= starts[:-1, None]
    token = torch.where(new, token, 0)
    batch.positions.index_add_(0, token.flatten(), torch.where(new, depths, 0).flatten())
    batch.tree_bits.index_add_(0, token.flatten(), torch.where(new[..., None], bits, 0).flatten(0, 1))
