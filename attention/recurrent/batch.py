"""Describes one packed forward over recurrent states: which tokens run from which checkpoint on, and what sees what.

The tokens of a sequence since its checkpoint, kept and new, are cut in two. Blocks of a chain at the front go into the
state, which only happens where the others would not fit; the open tokens at the end are kept beside it, so that they
can be taken back. Trees are among the open ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attention.kv.recurrent import RecurrentStates

BROKEN = 1 << 60  # more tokens than any sequence has
Trees = Sequence | tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Block:
    """Up to M tokens of each of b rows, in order, padded at the end; all tensors on one device.

    cells [b]: where the states of each row are
    counts [b]: tokens of each row
    new [b, M]: index among the packed new tokens, of those that are new
    kept [b, M]: place among the tokens that the states keep, of the others
    is_new, is_token [b, M] bool
    any_kept: whether any token is a kept one
    sees [b or 1, M, M] bool: the ancestors of each token and itself (None: all tokens before it)
    dense: whether the b * M packed new tokens are those of the block, so that nothing need be gathered
    """

    cells: Tensor
    counts: Tensor
    new: Tensor
    kept: Tensor
    is_new: Tensor
    is_token: Tensor
    any_kept: bool
    sees: Tensor | None = None
    dense: bool = False

    def to(self, device: torch.device) -> "Block":
        """The same on another device."""
        held = {name: getattr(self, name) for name in ("cells", "counts", "new", "kept", "is_new", "is_token", "sees")}
        moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in held.items()}
        return replace(self, **moved)

    def gather(self, new: Tensor, kept: Tensor | None = None) -> Tensor:
        """`[b, M, *]` out of the packed `new [T, *]` and the `kept [cells, room, *]`; zeros where there is no token.

        Without `kept` those of kept tokens are zeros too."""
        if self.dense:
            return new.unflatten(0, self.new.shape)
        wide = lambda mask: mask.view(*mask.shape, *[1] * (new.ndim - 1))
        found, there = new[self.new], self.is_token
        if self.any_kept and kept is not None:
            found = torch.where(wide(self.is_new), found, kept[self.cells[:, None], self.kept])
        elif self.any_kept:
            there = there & self.is_new
        return found.masked_fill(wide(~there), 0)

    def scatter(self, values: Tensor, out: Tensor | None, tokens: int) -> Tensor:
        """The packed `out [T, *]` (None: of `tokens` that are not written yet) with `values [b, M, *]` of new tokens."""
        if self.dense:
            return values.flatten(0, 1).contiguous()
        out = values.new_empty(tokens, *values.shape[2:]) if out is None else out
        chosen = self.is_new & self.is_token
        out[self.new[chosen]] = values[chosen].to(out.dtype)
        return out


@dataclass(slots=True)
class RecurrentBatch:
    """A forward over the last `counts` tokens of `sequences`, which hold `lengths` tokens with these.

    trees: those that sequences end with, as `attention.paged.batch.build_batch` takes them.
    """

    states: RecurrentStates
    sequences: Sequence[int]
    lengths: Sequence[int]
    counts: Sequence[int]
    trees: Trees | None = None
    _made: dict = field(default_factory=dict, init=False)
    _kept: list[int] = field(default_factory=list, init=False)  # tokens of each that are kept, before the new ones
    _folded: list[int] = field(default_factory=list, init=False)  # how many go into its state
    _open: list[int] = field(default_factory=list, init=False)  # how many do not

    def __post_init__(self):
        states, nodes = self.states, self._nodes()
        states.require_room(max(nodes, default=0))
        since = [n - states.checkpoint(s).tokens for s, n in zip(self.sequences, self.lengths, strict=True)]
        self._kept = [n - count for n, count in zip(since, self.counts, strict=True)]
        if min(self._kept) < 0:
            broken = [sequence for sequence, kept in zip(self.sequences, self._kept, strict=True) if kept < 0]
            raise ValueError(f"a forward over sequences {broken} broke: truncate them to 0 and run their texts again")
        open_tokens = [max(min(states.rollback, n), tree) for n, tree in zip(since, nodes, strict=True)]
        most = states.room - states.rollback
        self._folded = [n - few if n > most else 0 for n, few in zip(since, open_tokens, strict=True)]
        self._open = [n - folded for n, folded in zip(since, self._folded, strict=True)]

    def _nodes(self) -> list[int]:
        if self.trees is None:
            return [0] * len(self.sequences)
        if isinstance(self.trees, tuple) and isinstance(self.trees[0], Tensor):
            return [self.trees[1].shape[1]] * len(self.sequences)
        return [0 if tree is None else len(tree[0]) for tree in self.trees]

    def begin(self, layers: int) -> None:
        """Note that `layers` states are about to change: if that breaks, their sequences can only be emptied.

        Where a forward runs the first layers alone no token goes into a state, so that all states have seen the same.
        Raises ValueError where there is no room for that."""
        if any(self._folded) and layers < len(self.states.places):
            self._open = [folded + n for folded, n in zip(self._folded, self._open, strict=True)]
            self._folded = [0] * len(self._open)
            if max(self._open) > self.states.room:
                raise ValueError(
                    f"{max(self._open)} tokens after the checkpoint of {layers} of {len(self.states.places)} layers "
                    f"are more than {self.states.room}: keep more (`require_rollback`)"
                )
        for sequence, folded in zip(self.sequences, self._folded, strict=True):
            self.states.checkpoint(sequence).tokens += BROKEN if folded else 0

    def finish(self) -> None:
        """Note that the forward has run, in every layer."""
        for sequence, folded in zip(self.sequences, self._folded, strict=True):
            self.states.checkpoint(sequence).tokens += folded - BROKEN if folded else 0

    def blocks(self, size: int, device: torch.device) -> list[Block]:
        """The tokens that go into the states, in blocks of up to `size` of each sequence, one after the other."""
        key = min(size, max(self._folded)), device
        if key not in self._made:
            starts = range(0, max(self._folded), size)
            self._made[key] = [
                self._block([i for i, n in enumerate(self._folded) if n > start], start, size, self._folded).to(device)
                for start in starts
            ]
        return self._made[key]

    def open_block(self, device: torch.device) -> Block:
        """The tokens after them."""
        if device not in self._made:
            rows, ends = range(len(self.sequences)), [a + b for a, b in zip(self._folded, self._open, strict=True)]
            block = self._block(rows, None, max(self._open), ends)
            self._made[device] = block.to(device)
        return self._made[device]

    def _block(self, rows: Sequence[int], start: int | None, size: int, ends: Sequence[int]) -> Block:
        """Tokens of `rows` from `start` (None: from the first open one) up to `ends`, at most `size` of each."""
        first = torch.tensor([self._folded[i] if start is None else start for i in rows])
        counts = torch.tensor([min(size, ends[i] - int(at)) for i, at in zip(rows, first, strict=True)])
        kept = torch.tensor([self._kept[i] for i in rows])
        begins = torch.tensor([0, *self.counts]).cumsum(0)[:-1][torch.tensor(list(rows))]
        cells = torch.tensor([self.states.checkpoint(self.sequences[i]).cell for i in rows])
        token = first[:, None] + torch.arange(int(counts.max()))
        is_new, is_token = token >= kept[:, None], token < (first + counts)[:, None]
        new = torch.where(is_new & is_token, begins[:, None] + token - kept[:, None], 0)
        place = torch.where(is_new, 0, token)
        sees = self._sees() if start is None else None
        dense = bool((is_new & is_token).all()) and sum(self.counts) == new.numel()
        return Block(cells, counts, new, place, is_new, is_token, bool((~is_new & is_token).any()), sees, dense)

    def _sees(self) -> Tensor | None:
        """`[B, M, M]` bool for the open tokens; None where all are chains."""
        nodes = self._nodes()
        if not any(nodes):
            return None
        assert self.trees is not None
        on_device = isinstance(self.trees, tuple) and isinstance(self.trees[0], Tensor)
        bits = list(self.trees[1]) if on_device else [None if tree is None else tree[1] for tree in self.trees]
        size = max(self._open)
        device = next(x.device if isinstance(x, Tensor) else torch.device("cpu") for x in bits if x is not None)
        sees = torch.ones(size, size, dtype=torch.bool, device=device).tril().repeat(len(bits), 1, 1)
        tables: dict[int, Tensor] = {}
        for row, (words, count, end) in enumerate(zip(bits, nodes, self._open, strict=True)):
            if count:
                if id(words) not in tables:
                    tables[id(words)] = seen_of(torch.as_tensor(words, device=device))
                sees[row, end - count : end, end - count : end] = tables[id(words)]
        return sees


def seen_of(words: Tensor) -> Tensor:
    """`[*, M, M]` bool of ancestor bits `[*, M, W]`."""
    node = torch.arange(words.shape[-2], device=words.device)
    return (words[..., node // 64] >> (node % 64) & 1).bool()


@dataclass(slots=True)
class DeviceRecurrentBatch:
    """A forward over `count` new tokens of each row, after all tokens that the states at `cells [B]` have seen.

    What is where is known on the device only, so that a CUDA graph can be captured with it (`DeviceSequences`).

    bits: of the trees that the tokens are, `[B, M, W]` or `[1, M, W]` (None: chains).
    Raises ValueError for trees some of whose nodes ran before, and more tokens than there is room for.
    """

    states: RecurrentStates
    cells: Tensor
    count: int
    bits: Tensor | None = None
    _block: Block | None = field(default=None, init=False)

    def __post_init__(self):
        if self.bits is not None and self.bits.shape[1] != self.count:
            raise ValueError(
                f"a tree of {self.bits.shape[1]} nodes over recurrent states runs at once, not {self.count}"
            )
        if self.count > self.states.room:
            raise ValueError(
                f"{self.count} tokens after a checkpoint are more than {self.states.room}: keep more "
                "(`require_rollback`)"
            )

    def begin(self, layers: int) -> None:
        """Nothing goes into a state."""

    def finish(self) -> None:
        """Nothing has."""

    def blocks(self, size: int, device: torch.device) -> list[Block]:
        """None."""
        return []

    def open_block(self, device: torch.device) -> Block:
        """All tokens."""
        if self._block is None:
            rows = len(self.cells)
            new = torch.arange(rows * self.count, device=device).view(rows, -1)
            yes = torch.ones_like(new, dtype=torch.bool)
            sees = None if self.bits is None else seen_of(self.bits)
            counts = torch.full_like(self.cells, self.count)
            self._block = Block(self.cells, counts, new, torch.zeros_like(new), yes, yes, False, sees, dense=True)
        return self._block
