"""Sequences whose lengths are known on the device only: rounds without the host append to them and commit in them.

Pages are taken before a round, which reads block tables at fixed addresses, so that a CUDA graph captured with these
tensors may be replayed round after round. `build_batch` is the counterpart for lengths that are known on the host."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.gpu import to_device
from attention.kv.cache import PagedKVCache
from attention.native.call import Call
from attention.native.library import Library
from attention.paged.batch import AttentionBatch, shifts_of
from attention.recording import Sink, current, native_sink, unrecorded
from attention.recurrent.batch import DeviceRecurrentBatch

PLACE = Library(Path(__file__).with_name("device_batch_kernel.c"))


class DeviceSequences:
    """B sequences of `cache` of up to `capacity` tokens each, chosen by `load`.

    `lengths [B]` int64 counts the tokens of each; the caller writes it in place. Rows where `alive [B]` (bool, a tensor
    that several may share) is False have ended or are padding: they are computed too, and store nothing. Recurrent
    states are in `cells [B]`, and must have seen the tokens before those that `append` adds. `shifts [B]` are those of
    the cache (`PagedKVCache.shifts`).

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
        self.cache, self.capacity, self.alive = cache, capacity, alive
        self._tables: list[tuple[int, ...]] = [()] * len(alive)  # the host's copy of what was written of each row
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.int64, device=cache.device)
        with torch.inference_mode(False), unrecorded():  # they outlive the call that makes them
            self.block_tables, self.lengths = zeros(len(alive), cache.pages_for(capacity)), zeros(len(alive))
            # the slot of every position, so that finding one is a single load
            self._slots = zeros(len(alive), self.block_tables.shape[1] * cache.page_size)
            self._offsets = torch.arange(cache.page_size, device=cache.device)
            self._held = [0 if cache.states is None else cache.states.cells] * len(alive)  # the host's copy of `cells`
            self.cells, self.shifts = torch.tensor(self._held, device=cache.device), zeros(len(alive))
            self._shifted = [0] * len(alive)  # the host's copy of `shifts`

    def load(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Hold the first `lengths` tokens of `sequences` in the first rows, alive; further rows are padding.

        Does not synchronise. The cache must already hold `capacity` tokens of each, or as many as will be appended
        later. Raises ValueError for more sequences than rows, or more tokens than the cache holds."""
        rows, width = self.block_tables.shape
        tables = [self.cache.pages(sequence)[:width] for sequence in sequences]
        if len(sequences) > rows or any(
            length > self.cache.length(s) for s, length in zip(sequences, lengths, strict=True)
        ):
            held = [self.cache.length(sequence) for sequence in sequences]
            raise ValueError(
                f"{rows} rows cannot take {len(sequences)} sequences of {list(lengths)} tokens, of which the cache "
                f"holds {held}"
            )
        device, padding = self.lengths.device, rows - len(lengths)
        if tables + [()] * padding != self._tables:
            self._tables = tables + [()] * padding
            padded = [(*table, *[0] * (width - len(table))) for table in self._tables]
            self.block_tables.copy_(to_device(torch.tensor(padded), device))
            self._slots.copy_((self.block_tables[:, :, None] * self.cache.page_size + self._offsets).flatten(1))
        if self.cache.states is not None:
            states = self.cache.states
            self._write_cells([*states.cells_of(sequences), *[states.cells] * padding])
        self._write_shifts([*shifts_of(self.cache, sequences), *[0] * padding])
        packed = to_device(torch.tensor([[*lengths, *[0] * padding], [1] * len(lengths) + [0] * padding]), device)
        self.lengths.copy_(packed[0])
        self.alive.copy_(packed[1])

    def follow(self, rows: Sequence[int], sequences: Sequence[int]) -> None:
        """Write the pages that `sequences` have now into `rows`, where these hold others; nothing else changes.

        Does not synchronise: rounds that were launched before read the old ones."""
        if self.cache.states is not None:
            cells = list(self._held)
            for row, cell in zip(rows, self.cache.states.cells_of(sequences), strict=True):
                cells[row] = cell
            self._write_cells(cells)
        if self.cache.shifts or any(self._shifted):
            shifts = list(self._shifted)
            for row, shift in zip(rows, shifts_of(self.cache, sequences), strict=True):
                shifts[row] = shift
            self._write_shifts(shifts)
        width, changed = self.block_tables.shape[1], list[tuple[int, int, int]]()
        for row, pages in zip(rows, map(self.cache.table.pages, sequences), strict=True):
            held = self._tables[row]
            if pages is not held:
                self._tables[row] = pages = pages[:width]
                changed += [(row, i, page) for i, page in enumerate(pages) if held[i : i + 1] != (page,)]
        if changed:
            where, place, page = to_device(torch.tensor(changed).T.contiguous(), self.lengths.device)
            self.block_tables[where, place] = page
            slots = page[:, None] * self.cache.page_size + self._offsets
            self._slots.unflatten(1, (width, -1))[where, place] = slots

    def _write_cells(self, cells: list[int]) -> None:
        if cells != self._held:
            self._held = cells
            self.cells.copy_(to_device(torch.tensor(cells), self.cells.device))

    def _write_shifts(self, shifts: list[int]) -> None:
        if shifts != self._shifted:
            self._shifted = shifts
            self.shifts.copy_(to_device(torch.tensor(shifts), self.shifts.device))

    def _own_cells(self) -> Tensor:
        """`cells`, the spare one where a row is not alive: another sequence may have its own by now."""
        assert self.cache.states is not None
        return torch.where(self.alive, self.cells, self.cache.states.cells)

    def append(self, count: int, tree: tuple[Tensor, Tensor] | None = None) -> AttentionBatch:
        """Describe a forward over `count` further tokens of every row, packed in order, and add them to `lengths`.

        `tree` are the nodes of each row's tail, of which the new tokens are the last: depths `[B, M]` and ancestor bits
        `[B, M, W]`, or `[1, M]` and `[1, M, W]` where all rows have the same."""
        bits = cu_nodes = node_positions = recurrent = None
        if (states := self.cache.states) is not None:
            recurrent = DeviceRecurrentBatch(states, self._own_cells(), count, None if tree is None else tree[1])
        if tree is None:
            kv_lengths, cu_seqlens, positions, slots = place_tokens(self.lengths, self.alive, self._slots, count)
        else:
            placed = place_nodes(self.lengths, self.alive, self._slots, count, *tree)
            kv_lengths, cu_seqlens, positions, slots, bits, cu_nodes, node_positions = placed
        return AttentionBatch(
            self.cache, self.block_tables, kv_lengths, cu_seqlens, positions, slots,
            max_query_length=count, max_kv_length=self.capacity, uniform=False,
            tree_bits=bits, cu_tree_sizes=cu_nodes, tree_positions=node_positions, padding=True, recurrent=recurrent,
            shifts=self.shifts,
        )  # fmt: skip

    def commit_states(self, path: Tensor, counts: Tensor) -> None:
        """Move the recurrent states past the first token of the last `append` and the first `counts [B]` of `path`.

        `path [B, E]`: as `commit` takes it. Does nothing where there are none; the host hears of it by `moved_to`."""
        if (states := self.cache.states) is not None:
            places = torch.cat([torch.zeros_like(counts)[:, None], path], 1)
            states.replay(self._own_cells(), places, torch.where(self.alive, counts + 1, 0))

    def commit(self, starts: Tensor, path: Tensor, counts: Tensor) -> None:
        """Move the first `counts [B]` tokens of `path [B, E]` to the positions after `starts [B]`.

        `path` holds offsets from `starts` that increase along each row. The caller sets `lengths`."""
        moves = moves_of(starts, path, counts, self.alive, self._slots)
        self.cache.move(*moves, self.cache.num_pages * self.cache.page_size)


def moves_of(starts: Tensor, path: Tensor, counts: Tensor, alive: Tensor, table: Tensor,
             impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `DeviceSequences.commit` moves: the slots `[B * E]` from which and to which, and the segments `[B + 1]`.

    `table [B, positions]` has the slot of every position; tokens that stay where they are have slots -1."""
    if resolve(impl, path.device) == "triton":
        from attention.paged.device_batch_kernel import launch_moves

        return launch_moves(starts, path, counts, alive, table)
    rows, depth = path.shape
    place = torch.arange(depth, device=path.device)
    sources, targets = starts[:, None] + path, starts[:, None] + 1 + place
    kept = (place < counts[:, None]) & alive[:, None] & (sources != targets)
    sources, targets = (torch.where(kept, slots_at(table, at), -1).flatten() for at in (sources, targets))
    return sources, targets, torch.arange(rows + 1, device=path.device) * depth


def slots_at(table: Tensor, place: Tensor) -> Tensor:
    """The slots `[B, n]` of positions `place [B, n]`, clamped into `table [B, positions]`."""
    return table.gather(1, place.clamp(0, table.shape[1] - 1))


def place_tokens(
    lengths: Tensor, alive: Tensor, table: Tensor, count: int, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add `count` to `lengths [B]` in place and describe the new tokens.

    Returns key lengths `[B]`, the cumulative counts of new tokens `[B + 1]`, and positions and slots of the new tokens
    `[B * count]`. `table [B, positions]` has the slot of every position. Tokens of rows that are not `alive [B]`, and
    those before position 0, have slot -1; rows that are not alive have no more keys than new tokens, so that attention
    reads nothing for them."""
    if resolve(impl, lengths.device) == "triton":
        from attention.paged.device_batch_kernel import launch_place

        return launch_place(lengths, alive, table, count)
    sink = native_sink() if impl is None else None
    if sink is not None and all(x.is_contiguous() for x in (lengths, alive, table)):
        return _place_in_c(sink, lengths, alive, table, count)
    if len(lengths) == 1 and (recorder := current()) is not None:
        with recorder.pause():
            place_one = PlaceOne(lengths, alive, table, count)
        recorder.leaf(place_one)
        return place_one.placed
    lengths += count
    place = lengths[:, None] + torch.arange(-count, 0, device=lengths.device)
    slots = torch.where(alive[:, None] & (place >= 0), slots_at(table, place), -1)
    before = torch.arange(len(lengths) + 1, device=lengths.device) * count
    kv_lengths = torch.where(alive, lengths, count).clamp(min=count)
    return kv_lengths, before, place.clamp(min=0).flatten(), slots.flatten()


def place_nodes(lengths: Tensor, alive: Tensor, table: Tensor, count: int, depths: Tensor, words: Tensor,
                impl: str | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    """`place_tokens` for the last `count` nodes of trees, at whose depths the positions are.

    depths, words: see `DeviceSequences.append`

    Returns what `place_tokens` does, then ancestor bits of the new tokens `[B * count, W]`, the cumulative counts of
    nodes `[B + 1]` and the positions of all nodes `[B * M]`."""
    if resolve(impl, lengths.device) == "triton":
        from attention.paged.device_batch_kernel import launch_place_nodes

        return launch_place_nodes(lengths, alive, table, count, depths, words)
    kv_lengths, cu_seqlens, _, slots = place_tokens(lengths, alive, table, count, impl)
    rows, nodes = len(lengths), depths.shape[1]
    of_nodes = (lengths - nodes)[:, None] + depths.expand(rows, -1)
    positions = of_nodes[:, nodes - count :].clamp(min=0).flatten()
    new = words.expand(rows, -1, -1)[:, nodes - count :]
    bits = new.reshape(rows * count, -1).contiguous()  # one of a few may be a view
    cu_nodes = torch.arange(rows + 1, device=lengths.device) * nodes
    return kv_lengths, cu_seqlens, positions, slots, bits, cu_nodes, of_nodes.flatten()


def _place_in_c(sink: Sink, lengths: Tensor, alive: Tensor, table: Tensor,
                count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = len(lengths)
    with sink.pause():
        kv_lengths, positions, slots = (lengths.new_empty(size) for size in (rows, rows * count, rows * count))
        before = torch.arange(rows + 1) * count
    sizes = rows, table.shape[1], count
    sink.leaf(Call(PLACE, "place_tokens", lengths, alive, table, kv_lengths, positions, slots, *sizes),
              lengths, alive, table, outputs=(kv_lengths, positions, slots))  # fmt: skip
    return kv_lengths, before, positions, slots


class PlaceOne:
    """`place_tokens` for a single row in a recording, which the host reads: a step instead of ten."""

    def __init__(self, lengths: Tensor, alive: Tensor, table: Tensor, count: int):
        self._lengths, self._alive, self._table, self._count = lengths, alive, table, count
        self._kv, self._positions, self._slots = (lengths.new_empty(n) for n in (1, count, count))
        self.placed = self._kv, torch.tensor([0, count]), self._positions, self._slots

    def __call__(self) -> None:
        """Run it."""
        count, table = self._count, self._table
        length = int(self._lengths.add_(count))
        self._kv.fill_(max(length, count) if self._alive else count)
        torch.arange(length - count, length, out=self._positions)
        if count <= length <= table.shape[1] and self._alive:
            self._slots.copy_(table[0, length - count : length])
            return
        slots = slots_at(table, self._positions[None])[0]
        self._slots.copy_(torch.where(self._alive & (self._positions >= 0), slots, -1))
        self._positions.clamp_(min=0)
