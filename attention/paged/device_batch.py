"""Sequences whose lengths only the device knows: what rounds that no host looks into append to and commit in.

All pages are taken before the first round, so the block tables stand still and a CUDA graph captured with these tensors
may be replayed round after round. `attention.build_batch` is the same for sequences that the host keeps count of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.kv.cache import PagedKVCache
from attention.paged.batch import AttentionBatch


class DeviceSequences:
    """Room for B sequences of `cache`, each of up to `capacity` tokens; `load` says which.

    `lengths [B]` int64 counts the tokens that each holds; whoever runs the rounds writes it, in place. Rows that are
    not `alive [B]` bool, a tensor that several may share, have ended or are padding: they run along and store nothing.

    >>> cache = PagedKVCache(num_layers=1, num_pages=4, page_size=4, num_kv_heads=1, head_dim=8)
    >>> sequence = cache.add()
    >>> cache.append([sequence], [10])
    >>> rows = DeviceSequences(cache, capacity=10, alive=torch.zeros(2, dtype=torch.bool))
    >>> rows.load([sequence], [3])
    >>> batch = rows.append(2)
    >>> batch.positions.tolist(), batch.slots.tolist(), rows.lengths.tolist()
    ([3, 4, 0, 1], [3, 4, -1, -1], [5, 2])
    """

    def __init__(self, cache: PagedKVCache, capacity: int, alive: Tensor):
        if capacity < 1 or alive.ndim != 1 or alive.dtype != torch.bool:
            raise ValueError(
                f"capacity must be at least 1 and alive bool [B], got {capacity} and {alive.dtype} {list(alive.shape)}"
            )
        self.cache, self.capacity, self.alive, self._tables = cache, capacity, alive, None
        whole = lambda *shape: torch.zeros(*shape, dtype=torch.int64, device=cache.device)
        with torch.inference_mode(False):  # they outlive the call that makes them
            self.block_tables, self.lengths = whole(len(alive), cache.pages_for(capacity)), whole(len(alive))
            self._slots = whole(
                len(alive), self.block_tables.shape[1] * cache.page_size
            )  # of every position, so that each is one look
            self._offsets = torch.arange(cache.page_size, device=cache.device)
            self._rows = torch.arange(len(alive) + 1, device=cache.device)

    def load(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Take up `sequences`, of which `lengths` tokens count; they are alive, and the rows behind them hold nothing.
        Waits for nothing.

        The cache must hold `capacity` tokens of each already, or as many as will ever be appended; ValueError for more
        than there is room for."""
        rows, width = self.block_tables.shape
        tables = [self.cache.pages(sequence)[:width] for sequence in sequences]
        if len(sequences) > rows or any(
            length > self.cache.length(s) for s, length in zip(sequences, lengths, strict=True)
        ):
            held = [self.cache.length(sequence) for sequence in sequences]
            raise ValueError(
                f"{rows} rows cannot take {len(sequences)} sequences of {list(lengths)} tokens, of which the "
                f"cache holds {held}"
            )
        device, padding = self.lengths.device, rows - len(lengths)
        if tables != self._tables:
            self._tables = tables
            padded = [(*table, *[0] * (width - len(table))) for table in tables] + [(0,) * width] * padding
            self.block_tables.copy_(torch.tensor(padded).to(device, non_blocking=True))
            self._slots.copy_((self.block_tables[:, :, None] * self.cache.page_size + self._offsets).flatten(1))
        whole = torch.tensor([[*lengths, *[0] * padding], [1] * len(lengths) + [0] * padding]).to(
            device, non_blocking=True
        )
        self.lengths.copy_(whole[0])
        self.alive.copy_(whole[1])

    def append(self, count: int, tree: tuple[Tensor, Tensor] | None = None) -> AttentionBatch:
        """Describe a forward over `count` further tokens of every row, packed in order, and count them.

        `tree` are the nodes that form each row's tail, of which the new tokens are the last: depths `[B, M]` and
        ancestor bits `[B, M, W]`, or `[1, M]` and `[1, M, W]` where all rows have the same."""
        rows = len(self.lengths)
        kv_lengths, cu_seqlens, positions, slots = place_tokens(self.lengths, self.alive, self._slots, count)
        bits = nodes = of_nodes = None
        if tree is not None:
            depths, words = (x.expand(rows, *x.shape[1:]) for x in tree)
            nodes = depths.shape[1]
            of_nodes = (self.lengths - nodes)[:, None] + depths
            positions, bits = (
                of_nodes[:, nodes - count :].clamp(min=0).flatten(),
                words[:, nodes - count :].flatten(0, 1),
            )
        return AttentionBatch(
            cache=self.cache, block_tables=self.block_tables, kv_lengths=kv_lengths, cu_seqlens_q=cu_seqlens,
            positions=positions, slots=slots, max_query_length=count, max_kv_length=self.capacity, uniform=False,
            tree_bits=bits, cu_tree_sizes=None if nodes is None else self._rows * nodes,
            tree_positions=None if nodes is None else of_nodes.flatten(), padding=True,
        )  # fmt: skip

    def commit(self, starts: Tensor, path: Tensor, counts: Tensor) -> None:
        """Of the tokens behind position `starts [B]`, move those of `path [B, E]`, the first `counts [B]` of each, to
        starts + 1, starts + 2 …

        `path` increases along each row. `lengths` are the caller's to set.
        """
        depth = path.shape[1]
        place = torch.arange(depth, device=path.device)
        sources, targets = starts[:, None] + path, starts[:, None] + 1 + place
        kept = (place < counts[:, None]) & self.alive[:, None] & (sources != targets)
        sources, targets = (torch.where(kept, slots_at(self._slots, at), -1).flatten() for at in (sources, targets))
        self.cache.move(sources, targets, self._rows * depth, self.cache.num_pages * self.cache.page_size)


def slots_at(table: Tensor, place: Tensor) -> Tensor:
    """The slots `[B, n]` of positions `place [B, n]`, from `table [B, positions]`; positions outside of it give those
    at its ends.
    """
    return table.gather(1, place.clamp(0, table.shape[1] - 1))


def place_tokens(
    lengths: Tensor, alive: Tensor, table: Tensor, count: int, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add `count` to `lengths [B]`, in place -> key lengths `[B]`, how many of the new tokens lie before each row and
    before the end `[B + 1]`, and positions `[B * count]` and slots `[B * count]` of the new tokens.

    `table [B, positions]` has the slot of every position. Tokens of rows that are not `alive [B]`, and those before
    position 0, have slot -1."""
    if resolve(impl, lengths.device) == "triton":
        from attention.paged.device_batch_kernel import launch_place

        return launch_place(lengths, alive, table, count)
    lengths += count
    place = lengths[:, None] + torch.arange(-count, 0, device=lengths.device)
    slots = torch.where(alive[:, None] & (place >= 0), slots_at(table, place), -1)
    before = torch.arange(len(lengths) + 1, device=lengths.device) * count
    return lengths.clamp(min=count), before, place.clamp(min=0).flatten(), slots.flatten()
