"""What one packed forward needs to know about its sequences. It rides along to every attention call as a keyword."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention.cache import PagedKVCache


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """B sequences whose T new tokens lie packed one after the other; key positions 0 … L-1 include those new tokens.

    `tree_sizes [B]` says how many of a sequence's last new tokens are nodes of a token tree (0: plain causal), and `tree_bits [T, W]`
    (int64) which of them each token sees: bit n % 64 of word n // 64 is node n. `positions [T]` is the position of every token: its
    index in the sequence, or prefix length + depth for a tree node. All tensors are int64 on the cache's device. `max_query_length` is an
    upper bound: a CUDA graph captured with a batch may be replayed with other lengths up to it; tokens behind the last sequence's end get
    no output.
    """

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
    tree_sizes: Tensor | None = None
    _derived: dict = field(default_factory=dict, init=False)  # masks and indices shared by all layers

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.kv_lengths.shape[0]

    def derived(self, name, compute):
        """`compute(self)`, once for all layers of a forward."""
        if name not in self._derived:
            self._derived[name] = compute(self)
        return self._derived[name]


def ancestor_bits(parents: Sequence[int | None]) -> list[list[int]]:
    """Per node the nodes it sees (ancestors and itself) as int64 words; `parents[0]` is None and a parent comes before its children.

    >>> ancestor_bits([None, 0, 0, 1])
    [[1], [3], [5], [11]]
    """
    seen = []
    for node, parent in enumerate(parents):
        seen.append((0 if parent is None else seen[parent]) | 1 << node)
    words = -(-len(parents) // 64)
    as_int64 = lambda word: word - (1 << 64) if word >> 63 else word  # noqa: E731 - two's complement
    return [[as_int64(bits >> 64 * w & (1 << 64) - 1) for w in range(words)] for bits in seen]


def build_batch(cache: PagedKVCache, sequences: Sequence[int], query_lengths: Sequence[int],
                trees: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]] | None] | None = None) -> AttentionBatch:  # fmt: skip
    """Describe a forward over the last `query_lengths` tokens of `sequences`, which `cache.append` has already made room for.

    `trees` holds, for every sequence, None or the token tree that forms its tail: (depths, `ancestor_bits`) of the nodes. Raises
    ValueError when a query is empty or longer than its sequence, or shorter than its tree.
    """
    trees = [None] * len(sequences) if trees is None else trees
    if not sequences or len(trees) != len(sequences):
        raise ValueError(f"a batch needs sequences and one tree or None for each, got {len(sequences)} sequences and {len(trees)} trees")
    words = max((len(tree[1][0]) for tree in trees if tree), default=0)
    lengths = [cache.length(s) for s in sequences]
    positions, slots, cumulative, rows, sizes = [], [], [0], [], []
    for sequence, new, length, tree in zip(sequences, query_lengths, lengths, trees, strict=True):
        depths, bits = tree or ((), ())
        nodes = len(depths)
        if len(bits) != nodes or not max(1, nodes) <= new <= length:
            raise ValueError(f"sequence {sequence} of {length} tokens cannot have {new} query tokens with a tree of {nodes} nodes and {len(bits)} bit rows")
        plain = range(length - new, length - nodes)
        positions += plain
        positions += [length - nodes + depth for depth in depths]
        slots += cache.slots(sequence, range(length - new, length))
        cumulative.append(cumulative[-1] + new)
        sizes.append(nodes)
        if words:
            rows += [0] * (len(plain) * words)
            rows += [word for row in bits for word in (*row, *[0] * (words - len(row)))]
    tables = [cache.pages(s) for s in sequences]
    width = max(len(table) for table in tables)
    first = tables[0][0]
    in_a_row = len(tables) == 1 and tables[0] == tuple(range(first, first + width))

    # one tensor, one copy to the device, cut into views
    parts = [[page for table in tables for page in (*table, *[0] * (width - len(table)))], lengths, cumulative, positions, slots]
    parts += [rows, sizes] if words else []
    whole = torch.tensor([value for part in parts for value in part], dtype=torch.int64).to(cache.device, non_blocking=True)
    pieces = whole.split([len(part) for part in parts])
    return AttentionBatch(
        cache=cache,
        block_tables=pieces[0].view(len(tables), width),
        kv_lengths=pieces[1],
        cu_seqlens_q=pieces[2],
        positions=pieces[3],
        slots=pieces[4],
        max_query_length=max(query_lengths),
        max_kv_length=max(lengths),
        uniform=len(set(query_lengths)) == 1 and len(set(lengths)) == 1,
        run=slice(first * cache.page_size, first * cache.page_size + lengths[0]) if in_a_row else None,
        tree_bits=pieces[5].view(len(positions), words) if words else None,
        tree_sizes=pieces[6] if words else None,
    )
