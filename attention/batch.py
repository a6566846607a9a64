"""What one packed forward needs to know about its sequences. It rides along to every attention call as a keyword."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention.cache import PagedKVCache


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """B sequences whose T new tokens lie packed one after the other; key positions 0 … L-1 include those new tokens.

    The last tokens of a sequence may be the nodes of a token tree: `cu_tree_sizes [B + 1]` counts the nodes of the sequences before (a
    sequence without a tree has none) and `tree_bits [T, W]` (int64) says which nodes each token sees: bit n % 64 of word n // 64 is node n.
    The first nodes may be in the cache already; the new tokens are then the last nodes. `positions [T]` is the position of every new token:
    its index in the sequence, or prefix length + depth for a tree node; `tree_positions [nodes of all trees]` has those of all nodes.

    All tensors are int64 on the cache's device. `max_query_length` is an upper bound: a CUDA graph captured with a batch may be replayed
    with other lengths up to it; tokens behind the last sequence's end get no output.
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
    cu_tree_sizes: Tensor | None = None
    tree_positions: Tensor | None = None
    padding: bool = False  # slots may be negative: those of tokens that are not to be stored
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
                trees: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]] | None] | tuple[Tensor, Tensor] | None = None) -> AttentionBatch:  # fmt: skip
    """Describe a forward over the last `query_lengths` tokens of `sequences`, which `cache.append` has already made room for.

    `trees` holds, for every sequence, None or the token tree that forms its tail: (depths, `ancestor_bits`) of the nodes, of which the new
    tokens may be the last few only. Trees of M nodes each that only the device knows are a pair of tensors, depths `[B, M]` and bits
    `[B, M, W]`. Raises ValueError when a query is empty or longer than its sequence, or a sequence shorter than its tree.
    """
    on_device = trees if isinstance(trees, tuple) and isinstance(trees[0], Tensor) else None
    if on_device is not None:
        blank = ([0] * on_device[0].shape[1], [[0] * on_device[1].shape[2]] * on_device[0].shape[1])
        trees = [blank] * on_device[0].shape[0]
    trees = [None] * len(sequences) if trees is None else trees
    if not sequences or len(trees) != len(sequences):
        raise ValueError(f"a batch needs sequences and one tree or None for each, got {len(sequences)} sequences and {len(trees)} trees")
    words = max((len(tree[1][0]) for tree in trees if tree), default=0)
    lengths = [cache.length(s) for s in sequences]
    positions, slots, cumulative, rows, tree_positions, cumulative_nodes = [], [], [0], [], [], [0]
    for sequence, new, length, tree in zip(sequences, query_lengths, lengths, trees, strict=True):
        depths, bits = tree or ((), ())
        nodes, first_node = len(depths), length - len(depths)
        if len(bits) != nodes or not 1 <= new <= length or first_node < 0:
            raise ValueError(f"sequence {sequence} of {length} tokens cannot have {new} query tokens with a tree of {nodes} nodes and {len(bits)} bit rows")
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
    width = max(len(table) for table in tables)
    first = tables[0][0]
    in_a_row = len(tables) == 1 and tables[0] == tuple(range(first, first + width))

    # one tensor, one copy to the device, cut into views
    parts = [[page for table in tables for page in (*table, *[0] * (width - len(table)))], lengths, cumulative, positions, slots]
    parts += [rows, cumulative_nodes, tree_positions] if words else []
    whole = torch.tensor([value for part in parts for value in part], dtype=torch.int64).to(cache.device, non_blocking=True)
    pieces = whole.split([len(part) for part in parts])
    batch = AttentionBatch(
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
        cu_tree_sizes=pieces[6] if words else None,
        tree_positions=pieces[7] if words else None,
    )
    if on_device is not None:
        _fill_in(batch, *on_device)
    return batch


def _fill_in(batch: AttentionBatch, depths: Tensor, bits: Tensor) -> None:
    """Add to a batch, made with depths and bits of zero, those of trees `[B, M]` and `[B, M, W]` that only the device knows."""
    nodes = depths.shape[1]
    batch.tree_positions.add_(depths.flatten())
    place = torch.arange(-nodes, 0, device=depths.device)
    token = batch.cu_seqlens_q[1:, None] + place  # [B, M]: where each node lies among the packed tokens
    new = token >= batch.cu_seqlens_q[:-1, None]
    token = torch.where(new, token, 0)
    batch.positions.index_add_(0, token.flatten(), torch.where(new, depths, 0).flatten())
    batch.tree_bits.index_add_(0, token.flatten(), torch.where(new[..., None], bits, 0).flatten(0, 1))
