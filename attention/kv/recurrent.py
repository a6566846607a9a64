"""Recurrent states of sequences, with checkpoints to roll back to.

A recurrent layer keeps of a text one state of fixed size, which cannot be cut like keys and values. So each sequence
keeps a checkpoint, its states after some token, and of the tokens since then what they put into the recurrence, which
is far smaller than a state. A commit runs those of the accepted path from the checkpoint on; a rejected token costs
nothing. The tokens that a forward runs read the checkpoint and the tokens since then at once, along a tree too.

Cells that no sequence uses may hold states of prefixes, under keys, for sequences to come; those that were used least
recently make room."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.gpu import to_device
from attention.kv.layout import RecurrentLayer
from attention.kv.page_table import OutOfPages
from attention.kv.state_pool import ROLLBACK, StatePool, room_for

MIN_CELLS = 4  # of states that grow


@dataclass(slots=True)
class Checkpoint:
    """cell: where the states of a sequence are; tokens: how many of its tokens they have seen."""

    cell: int
    tokens: int = 0


class RecurrentStates:
    """States of `layers` for the sequences of one cache, by the sequences' numbers there.

    cells: sequences that have a state at the same time (None: as many as there are).
    rollback: last tokens of a sequence that can be taken back without computing its text again, at least.
    devices: of each layer.
    pools, places: the states; the pool of each layer, and the layer there.
    on_move: called before the states get other addresses, which graphs read.

    >>> layer = RecurrentLayer("convolution", state=(8, 3), inputs=((8,),))
    >>> states = RecurrentStates([layer], cells=1, dtype=torch.float32, devices=[torch.device("cpu")])
    >>> states.add([0], [0])
    [0]
    >>> states.kept_length(0, 5), states.free_cells
    (5, 0)
    """

    def __init__(self, layers: Sequence[RecurrentLayer], cells: int | None, dtype: torch.dtype,
                 devices: Sequence[torch.device], rollback: int = ROLLBACK):  # fmt: skip
        self._fixed, self.cells = cells is not None, cells or MIN_CELLS
        self.rollback, self.room = rollback, room_for(rollback)
        kinds = list(zip(layers, devices, strict=True))
        order = list(dict.fromkeys(kinds))
        self.pools = [
            StatePool(layer, kinds.count((layer, device)), self.cells, self.room, dtype, device)
            for layer, device in order
        ]
        self.places = tuple((order.index(kind), kinds[:i].count(kind)) for i, kind in enumerate(kinds))
        self._free = list(range(self.cells - 1, -1, -1))
        self._checkpoints: dict[int, Checkpoint] = {}
        self._kept: OrderedDict[Hashable, int] = OrderedDict()  # key: cell; the least recently used first
        self.on_move: Callable[[], object] = lambda: None

    @property
    def free_cells(self) -> int | None:
        """Sequences that can begin; None: any number."""
        return len(self._free) + len(self._kept) if self._fixed else None

    def _take_cell(self) -> int:
        """A cell that no sequence uses; its kept state, if it has one, is lost."""
        return self._free.pop() if self._free else self._kept.popitem(last=False)[1]

    def checkpoint(self, sequence: int) -> Checkpoint:
        """The checkpoint of a sequence that holds tokens."""
        return self._checkpoints[sequence]

    def held(self, sequence: int) -> bool:
        """Whether `sequence` has a state."""
        return sequence in self._checkpoints

    def require_rollback(self, tokens: int) -> None:
        """Keep so many last tokens of each sequence from now on, at least."""
        self.rollback = max(self.rollback, tokens)
        self.require_room(room_for(self.rollback))

    def require_room(self, tokens: int) -> None:
        """Have room for so many tokens after the checkpoints, at least."""
        if tokens > self.room:
            self._resize(self.cells, tokens)

    def _resize(self, cells: int, room: int) -> None:
        self.on_move()
        for pool in self.pools:
            pool.resize(cells, room)
        self._free = [*range(cells - 1, self.cells - 1, -1), *self._free]
        self.cells, self.room = cells, room

    def add(self, sequences: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Begin a state for those of `sequences` that have none, and must hold no tokens yet -> these.

        Raises OutOfPages where there are too few cells, and ValueError for a sequence of other `lengths` than 0: its
        tokens came from elsewhere, without their state."""
        new = [
            (sequence, length) for sequence, length in zip(sequences, lengths, strict=True) if not self.held(sequence)
        ]
        for sequence, length in new:
            if length:
                raise ValueError(f"sequence {sequence} holds {length} tokens without their recurrent state")
        if len(new) > (free := len(self._free) + len(self._kept)):
            if self._fixed:
                raise OutOfPages(f"{len(new)} recurrent states are needed, but {free} of {self.cells} are free")
            self._resize(max(2 * self.cells, self.cells + len(new)), self.room)
        for sequence, _ in new:
            self._checkpoints[sequence] = Checkpoint(self._take_cell())
        cells = [self._checkpoints[sequence].cell for sequence, _ in new]
        for pool in self.pools if cells else ():
            pool.states.index_fill_(1, to_device(torch.tensor(cells), pool.device), 0)
        return [sequence for sequence, _ in new]

    def release(self, sequence: int) -> None:
        """Let go of the state of `sequence`, if it has one."""
        if self.held(sequence):
            self._free.append(self._checkpoints.pop(sequence).cell)

    def require_cell(self, sequence: int) -> None:
        """Raise OutOfPages where there is no room for a copy of the state of `sequence`."""
        if self.held(sequence) and self.free_cells == 0:
            raise OutOfPages(f"a copy of a recurrent state is needed, but all {self.cells} are in use")

    def fork(self, sequence: int, twin: int) -> None:
        """Give `twin` a copy of what `sequence` has; see `require_cell`."""
        if not self.held(sequence):
            return
        self.add([twin], [0])
        source, target = self._checkpoints[sequence], self._checkpoints[twin]
        target.tokens = source.tokens
        self._copy(source.cell, target.cell)

    def _copy(self, source: int, target: int) -> None:
        for pool in self.pools:
            for x in (pool.states, *pool.inputs):
                x[:, target] = x[:, source]

    def keep(self, sequence: int, length: int, key: Hashable) -> bool:
        """Keep the state of `sequence` after its first `length` tokens under `key`, while no sequence needs the cell.

        Returns whether it is kept: not where the checkpoint is past that length, or all cells are in use."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return True
        mark = self._checkpoints[sequence]
        if mark.tokens > length or not (self._free or self._kept):
            return False
        cell = self._take_cell()
        self._copy(mark.cell, cell)
        if since := length - mark.tokens:
            for pool in self.pools:
                given = torch.tensor([cell]), torch.arange(since)[None], torch.tensor([since])
                pool.replay(*(to_device(x, pool.device) for x in given))
        self._kept[key] = cell
        return True

    def kept(self, keys: Sequence[Hashable]) -> int:
        """How many of `keys` there are up to the last one that a state is kept under."""
        return next((len(keys) - i for i, key in enumerate(reversed(keys)) if key in self._kept), 0)

    def resume(self, sequence: int, length: int, key: Hashable) -> None:
        """Let `sequence`, which has no state, go on from the one that is kept under `key`, of `length` tokens."""
        if self._free or len(self._kept) > 1:
            self._kept.move_to_end(key)
            cell = self._take_cell()
            self._copy(self._kept[key], cell)
        else:  # there is no cell for a copy
            cell = self._kept.pop(key)
        self._checkpoints[sequence] = Checkpoint(cell, length)

    def drop_kept(self) -> None:
        """Forget all states that are kept."""
        self._free += self._kept.values()
        self._kept.clear()

    def kept_length(self, sequence: int, length: int) -> int:
        """How many tokens are left where `sequence` is to keep the first `length`: these, or none.

        None before the checkpoint: whoever goes on has to compute the text again."""
        return length if not self.held(sequence) or length >= self._checkpoints[sequence].tokens else 0

    def require_paths(self, sequences: Sequence[int], starts: Sequence[int]) -> None:
        """Raise ValueError where a path cannot begin at its start, which is before the checkpoint."""
        for sequence, start in zip(sequences, starts, strict=True):
            seen = self._checkpoints[sequence].tokens if self.held(sequence) else 0
            if start < seen:
                raise ValueError(
                    f"the recurrent state of sequence {sequence} has seen {seen} tokens, so a path cannot begin at "
                    f"{start}: keep more tokens (`require_rollback`)"
                )

    def commit(self, sequences: Sequence[int], starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Move each checkpoint to the end of its path: offsets from `start`, after the tokens before `start`.

        The states then have seen exactly the tokens that the cache keeps (`PagedKVCache.commit`)."""
        marks = [self._checkpoints[sequence] for sequence in sequences]
        places = [
            [*range(start - mark.tokens), *(start - mark.tokens + offset for offset in path)]
            for mark, start, path in zip(marks, starts, paths, strict=True)
        ]
        counts = [len(each) for each in places]
        if not any(counts):
            return
        padded = torch.tensor([each + [0] * (max(counts) - len(each)) for each in places])
        cells, kept = torch.tensor([mark.cell for mark in marks]), torch.tensor(counts)
        for pool in self.pools:
            pool.replay(*(to_device(x, pool.device) for x in (cells, padded, kept)))
        for mark, start, path in zip(marks, starts, paths, strict=True):
            mark.tokens = start + len(path)

    def settle(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Move the checkpoints of `sequences`, whose first `lengths` tokens stay, to the ends of these."""
        behind = [
            (sequence, length)
            for sequence, length in zip(sequences, lengths, strict=True)
            if self.held(sequence) and self._checkpoints[sequence].tokens < length
        ]
        self.commit([sequence for sequence, _ in behind], [length for _, length in behind], [()] * len(behind))

    def cells_of(self, sequences: Sequence[int]) -> list[int]:
        """Where the states of `sequences` are; the spare cell for one without."""
        return [self._checkpoints[one].cell if self.held(one) else self.cells for one in sequences]

    def moved_to(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Note that rounds on the device have moved checkpoints to the ends of the first `lengths` tokens."""
        for sequence, length in zip(sequences, lengths, strict=True):
            if self.held(sequence):
                self._checkpoints[sequence].tokens = length

    def replay(self, cells: Tensor, places: Tensor, counts: Tensor) -> None:
        """Run the first `counts [B]` of the kept tokens `places [B, E]` of `cells [B]`, all on one device, in place.

        The host hears of it by `moved_to`."""
        for pool in self.pools:
            pool.replay(cells, places, counts)


@contextmanager
def begin_states(states: RecurrentStates | None, sequences: Sequence[int], lengths: Iterable[int]) -> Iterator[None]:
    """Let `sequences` have states while they are given tokens, and from then on if that succeeds; see `add`."""
    begun = [] if states is None else states.add(sequences, list(lengths))
    try:
        yield
    except Exception:
        for sequence in begun:
            states.release(sequence)  # type: ignore[union-attr]
        raise
