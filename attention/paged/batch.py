"""What one packed forward needs to know about its sequences. It rides along to every attention call as a keyword."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from attention.kv.cache import PagedKVCache

TENSORS = (
    "block_tables", "kv_lengths", "cu_seqlens_q", "positions", "slots", "tree_bits", "cu_tree_sizes", "tree_positions",
)  # as they lie in memory  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """B sequences whose T new tokens lie packed one after the other; key positions 0 … L-1 include those new tokens.

    The last tokens of a sequence may be the nodes of a token tree: `cu_tree_sizes [B + 1]` counts the nodes of the
    sequences before (a sequence without a tree has none) and `tree_bits [T, W]` (int64) says which nodes each token
    sees: bit n % 64 of word n // 64 is node n. The first nodes may be in the cache already; the new tokens are then the
    last nodes. `positions [T]` is the position of every new token: its index in the sequence, or prefix length + depth
    for a tree node; `tree_positions [nodes of all trees]` has those of all nodes.

    All tensors are int64 on the cache's device. `max_query_length` is an upper bound: a CUDA graph captured with a
    batch may be replayed with other lengths up to it; tokens behind the last sequence's end get no output."""

    cache: PagedKVCache
    block_tables: Tensor  # [B, max pages], padded with page 0
    kv_lengths: Tensor  # [B]
    cu_seqlens_q: Tensor  # [B + 1]
    positions: Tensor  # [T]
    slots: Tensor  # [T], where each new token's key and value go
    max_query_length: int
    max_kv_length: int
    uniform: bool  # every sequence has the same number of new tokens and of keys
    run: slice | None = None  # the slots of the keys, where B = 1 and its pages lie in a row
    tree_bits: Tensor | None = None
    cu_tree_sizes: Tensor | None = None
    tree_positions: Tensor | None = None
    padding: bool = False  # slots may be negative: those of tokens that are not to be stored
    tail: bool = False  # there may be tokens behind the last sequence's end
    _derived: dict = field(default_factory=dict, init=False)  # masks and indices shared by all layers

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.kv_lengths.shape[0]

    def of_layer(self, layer: int) -> "AttentionBatch":
        """The same over one layer of the cache."""
        return replace(self, cache=self.cache.of_layer(layer))

    def forget(self) -> None:
        """What was derived holds no longer: the tensors have changed in place."""
        self._derived.clear()

    def derived(self, name, compute):
        """`compute(self)`, once for all layers of a forward."""
        if name not in self._derived:
            self._derived[name] = compute(self)
        return self._derived[name]


def ancestor_bits(parents: Sequence[int | None]) -> list[list[int]]:
    """Per node the nodes it sees (ancestors and itself) as int64 words; `parents[0]` is None and a parent comes before
    its children.

    >>> ancestor_bits([None, 0, 0, 1])
    [[1], [3], [5], [11]]
    """
    seen = []
    for node, parent in enumerate(parents):
        seen.append((0 if parent is None else seen[parent]) | 1 << node)
    words = -(-len(parents) // 64)
    as_int64 = lambda word: word - (1 << 64) if word >> 63 else word
    return [[as_int64(bits >> 64 * w & (1 << 64) - 1) for w in range(words)] for bits in seen]


def build_batch(
    cache: PagedKVCache,
    sequences: Sequence[int],
    query_lengths: Sequence[int],
    trees: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]] | None] | tuple[Tensor, Tensor] | None = None,
) -> AttentionBatch:
    """Describe a forward over the last `query_lengths` tokens of `sequences`, which `cache.append` has already made
    room for.

    `trees` holds, for every sequence, None or the token tree that forms its tail: (depths, `ancestor_bits`) of the
    nodes, of which the new tokens may be the last few only. Trees of M nodes each that only the device knows are a pair
    of tensors, depths `[B, M]` and bits `[B, M, W]`. Raises ValueError when a query is empty or longer than its
    sequence, or a sequence shorter than its tree."""
    on_device = trees if isinstance(trees, tuple) and isinstance(trees[0], Tensor) else None
    if on_device is not None:
        blank = ([0] * on_device[0].shape[1], [[0] * on_device[1].shape[2]] * on_device[0].shape[1])
        trees = [blank] * on_device[0].shape[0]
    parts, words = _describe(cache, sequences, query_lengths, trees)
    # one tensor, one copy to the device, cut into views
    whole = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64).to(cache.device, non_blocking=True)
    pages, lengths = parts[:2]
    first, width = pages[0], len(pages) // len(sequences)
    in_a_row = len(sequences) == 1 and pages == list(range(first, first + width))
    batch = AttentionBatch(
        cache=cache,
        **_views(whole, [len(part) for part in parts], width, words),
        max_query_length=max(query_lengths),
        max_kv_length=max(lengths),
        uniform=len(set(query_lengths)) == 1 and len(set(lengths)) == 1,
        run=slice(first * cache.page_size, first * cache.page_size + lengths[0]) if in_a_row else None,
    )
    if on_device is not None:
        _fill_in(batch, *on_device)
    return batch


def _describe(
    cache: PagedKVCache, sequences: Sequence[int], query_lengths: Sequence[int], trees: Sequence | None, width: int = 0
) -> tuple[list[list[int]], int]:
    """The tensors of a batch one after the other, as lists, and the words of a node's bits; block tables have `width`
    columns at least.
    """
    trees = [None] * len(sequences) if trees is None else trees
    if not sequences or len(trees) != len(sequences):
        raise ValueError(
            f"a batch needs sequences and one tree or None for each, got {len(sequences)} sequences and "
            f"{len(trees)} trees"
        )
    words = max((len(tree[1][0]) for tree in trees if tree), default=0)
    lengths = [cache.length(s) for s in sequences]
    positions, slots, cumulative, rows, tree_positions, cumulative_nodes = [], [], [0], [], [], [0]
    for sequence, new, length, tree in zip(sequences, query_lengths, lengths, trees, strict=True):
        depths, bits = tree or ((), ())
        nodes, first_node = len(depths), length - len(depths)
        if len(bits) != nodes or not 1 <= new <= length or first_node < 0:
            raise ValueError(
                f"sequence {sequence} of {length} tokens cannot have {new} query tokens with a tree of "
                f"{nodes} nodes and {len(bits)} bit rows"
            )
        in_tree = min(new, nodes)
        plain = range(length - new, length - in_tree)
        node_positions = [first_node + depth for depth in depths]
        positions += plain
        positions += node_positions[nodes - in_tree :]
        slots += cache.slots(sequence, range(length - new, length))
        cumulative.append(cumulative[-1] + new)
        if words:
            tree_positions += node_positions
            cumulative_nodes.append(cumulative_nodes[-1] + nodes)
            rows += [0] * (len(plain) * words)
            rows += [word for row in bits[nodes - in_tree :] for word in (*row, *[0] * (words - len(row)))]
    tables = [cache.pages(s) for s in sequences]
    width = max(width, *(len(table) for table in tables))
    parts = [
        [page for table in tables for page in (*table, *[0] * (width - len(table)))],
        lengths,
        cumulative,
        positions,
        slots,
    ]
    return parts + ([rows, cumulative_nodes, tree_positions] if words else []), words


def _views(whole: Tensor, sizes: Sequence[int], width: int, words: int) -> dict[str, Tensor | None]:
    """The tensors of a batch that lie one after the other in `whole`."""
    found = dict(zip(TENSORS, whole.split(list(sizes)), strict=False))
    shapes = {"block_tables": width} | ({"tree_bits": words} if words else {})
    return found | {name: found[name].view(-1, columns) for name, columns in shapes.items()}


class StaticBatch:
    """A `batch` whose tensors stay where they are while `load` fills them: what a CUDA graph of a whole forward reads.

    It holds exactly `num_sequences` sequences of up to `num_pages` pages with `num_nodes` tree nodes of `words` words
    each in all, and up to `num_tokens` new tokens; those behind the last sequence's end are padding, which is stored
    nowhere."""

    def __init__(
        self,
        cache: PagedKVCache,
        num_sequences: int,
        num_tokens: int,
        num_pages: int,
        words: int = 0,
        num_nodes: int = 0,
    ):
        self._num_pages, self._sizes = (
            num_pages,
            [num_sequences * num_pages, num_sequences, num_sequences + 1, num_tokens, num_tokens],
        )
        self._sizes += [num_tokens * words, num_sequences + 1, num_nodes] if words else []
        with torch.inference_mode(False):  # it outlives the call that makes it
            self._whole = torch.zeros(sum(self._sizes), dtype=torch.int64, device=cache.device)
        tensors = _views(self._whole, self._sizes, num_pages, words)
        tensors["slots"].fill_(-1)  # until it is loaded, its sequences are empty and nothing is stored
        self.batch = AttentionBatch(
            cache,
            **tensors,
            max_query_length=num_tokens,
            max_kv_length=num_pages * cache.page_size,
            uniform=False,
            padding=True,
            tail=True,
        )

    def load(
        self,
        sequences: Sequence[int],
        query_lengths: Sequence[int],
        trees: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]] | None = None,
    ) -> None:
        """Describe other sequences, as `build_batch` does."""
        parts, _ = _describe(self.batch.cache, sequences, query_lengths, trees, self._num_pages)
        padded = []
        for part, size, name in zip(parts, self._sizes, TENSORS, strict=False):
            padded += part
            padded += [-1 if name == "slots" else 0] * (size - len(part))
        self._whole.copy_(torch.tensor(padded).to(self._whole.device, non_blocking=True))


def _fill_in(batch: AttentionBatch, depths: Tensor, bits: Tensor) -> None:
    """Add to a batch, made with depths and bits of zero, those of trees `[B, M]` and `[B, M, W]` that only the device
    knows.
    """
    nodes = depths.shape[1]
    batch.tree_positions.add_(depths.flatten())
    place = torch.arange(-nodes, 0, device=depths.device)
    token = batch.cu_seqlens_q[1:, None] + place  # [B, M]: where each node lies among the packed tokens
    new = token >= batch.cu_seqlens_q[:-1, None]
    token = torch.where(new, token, 0)
    batch.positions.index_add_(0, token.flatten(), torch.where(new, depths, 0).flatten())
    batch.tree_bits.index_add_(0, token.flatten(), torch.where(new[..., None], bits, 0).flatten(0, 1))
