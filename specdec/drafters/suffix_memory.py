"""A bounded memory of past answers, in which the longest match of a text's end is found on the device.

A suffix tree with counts, written as a sorted list: `order` holds every place of the answers that has a next token,
sorted by the tokens from there backwards. A node of the tree is a run of it, its count the length of the run. Finding
the deepest one takes two comparisons with about the square root of all places, so a search has a fixed number of
operations and can be captured. Source: Oliaro et al. 2024 (SuffixDecoding), section 3; Manber and Myers 1990 for
sorted suffixes."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.base import Drafter, held_by
from specdec.drafters.lookup import shared_tokens

BEFORE, BEHIND = -1, 1 << 62  # tokens between two answers, and one that is greater than all others


@dataclass(frozen=True, slots=True)
class SuffixMemoryStats:
    """What a `SuffixMemory` holds, and has seen since it was made or cleared.

    answers, tokens: that it holds now; 0 answers: it is cold.
    added, evicted: answers so far.
    """

    answers: int = 0
    tokens: int = 0
    added: int = 0
    evicted: int = 0


@dataclass(frozen=True, slots=True)
class SuffixTable:
    """The answers on one device, at addresses that never change.

    tokens [n] int64: `BEFORE`, then each answer with a `BEFORE` after it; the last one is `BEHIND`
    order [n] int64: places with a next token, sorted by the tokens from there backwards; then the last place
    """

    tokens: Tensor
    order: Tensor

    @classmethod
    @torch.inference_mode(False)
    def empty(cls, size: int, device: torch.device | str) -> "SuffixTable":
        """A table of `size` places without an answer."""
        tokens = torch.full((size,), BEFORE, dtype=torch.int64, device=device)
        tokens[-1] = BEHIND
        return cls(tokens, torch.full_like(tokens, size - 1))

    def backwards(self, places: Tensor, depth: int) -> Tensor:
        """`[..., depth]`: the tokens from `places [...]` backwards."""
        return self.tokens[(places[..., None] - torch.arange(depth, device=places.device)).clamp(min=0)]

    def search(self, ending: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Places `[A, count]` whose tokens backwards share most with `ending [A, D]`, and how many they share.

        Of equal ones the answer that was added last comes first."""
        ending, size, depth = ending[:, None], len(self.order), ending.shape[1]
        block = isqrt(size - 1) + 1
        before = _less(self.backwards(self.order[::block], depth), ending).sum(1)  # [A]
        first = (before - 1).clamp(min=0) * block
        inside = first[:, None] + torch.arange(block + 1, device=ending.device)  # holds both neighbours of `ending`
        places = self.order[inside.clamp(max=size - 1)]
        shared = torch.where(inside < size, shared_tokens(self.backwards(places, depth), ending), 0)
        best = (shared * size + places).topk(min(count, block), 1).values
        best = torch.nn.functional.pad(best, (0, count - best.shape[1]))
        return best % size, best // size

    def following(self, places: Tensor, shared: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The up to `count` tokens after `places [A, C]` in their answers `[A, C, count]`, and which there are."""
        index = places[..., None] + torch.arange(1, count + 1, device=places.device)
        tokens = self.tokens[index.clamp(max=len(self.tokens) - 1)]
        there = (shared > 0)[..., None] & ((tokens == BEFORE) | (tokens == BEHIND)).cumsum(-1).eq(0)
        return tokens, there


def _less(tokens: Tensor, others: Tensor) -> Tensor:
    """`[...]`: whether `tokens [..., n]` come before `others [..., n]`, compared from the first on."""
    place = shared_tokens(tokens, others).clamp(max=tokens.shape[-1] - 1)[..., None]
    tokens, others = torch.broadcast_tensors(tokens, others)
    return (tokens.gather(-1, place) < others.gather(-1, place))[..., 0]


class SuffixMemory:
    """Remembers the last `max_answers` answers, of at most `max_tokens` tokens together, for a `SuffixDrafter`.

    It outlives calls, and several generators and engines, in threads too, may share it, as long as their targets have
    one tokenizer. It changes what is drafted, never the text of a lossless rule. What goes first is the answer that has
    been of no use for longest: it was added, or another answer repeated `max_match` tokens of it, before all others.
    Raises ValueError for bounds below 1.

    frozen: it takes up no further answer, so that measurements begin alike.

    >>> memory = SuffixMemory(max_answers=2)
    >>> for answer in ([1, 2, 3], [4, 5], [6, 7]):
    ...     memory.add(answer)
    >>> memory.stats
    SuffixMemoryStats(answers=2, tokens=4, added=3, evicted=1)
    """

    def __init__(self, max_answers: int = 1000, max_tokens: int = 1 << 18, max_match: int = 24):
        if min(max_answers, max_tokens, max_match) < 1:
            raise ValueError(
                f"max_answers, max_tokens and max_match must be at least 1, got {max_answers}, {max_tokens} and "
                f"{max_match}"
            )
        self.max_answers, self.max_tokens, self.max_match = max_answers, max_tokens, max_match
        self.frozen = False
        self._lock = threading.Lock()
        self._size = max_tokens + max_answers + 2
        self._master = SuffixTable.empty(self._size, "cpu")
        self._tables = {torch.device("cpu"): self._master}
        self._spans: OrderedDict[int, tuple[int, int]] = (
            OrderedDict()
        )  # of each answer: start, length; least useful first
        self._used, self._places, self._added, self._evicted = 1, 0, 0, 0

    @property
    def stats(self) -> SuffixMemoryStats:
        """What it holds."""
        with self._lock:
            tokens = sum(length for _, length in self._spans.values())
            return SuffixMemoryStats(len(self._spans), tokens, self._added, self._evicted)

    def clear(self) -> None:
        """Forget all answers."""
        with self._lock:
            self._keep([])
            self._added = self._evicted = 0
            self._copy()

    def table(self, device: torch.device) -> SuffixTable:
        """The answers on `device`, kept up to date there."""
        with self._lock:
            if device not in self._tables:
                self._tables[device] = SuffixTable.empty(self._size, device)
                self._copy()
            return self._tables[device]

    def add(self, answer: Sequence[int]) -> None:
        """Remember an answer, unless the memory is frozen; of one longer than the memory its end."""
        tokens = torch.tensor(list(answer)[-self.max_tokens :], dtype=torch.int64)
        if self.frozen or len(tokens) < 2:  # where no token follows another
            return
        with self._lock, torch.inference_mode():
            lengths, dropped = [length for _, length in self._spans.values()], 0
            while len(lengths) - dropped >= self.max_answers or sum(lengths[dropped:]) + len(tokens) > self.max_tokens:
                dropped += 1
            if dropped:
                self._keep(list(self._spans)[dropped:])
            self._evicted, self._added = self._evicted + dropped, self._added + 1
            self._insert(tokens)
            self._copy()

    def _keep(self, numbers: Sequence[int]) -> None:
        """Drop all answers but `numbers`, the least useful first, and close the gaps."""
        tokens, order = self._master.tokens, self._master.order
        kept = torch.zeros(self._used, dtype=torch.bool)
        kept[0] = True
        for start, length in (self._spans[number] for number in numbers):
            kept[start : start + length + 1] = True
        moved = kept.cumsum(0) - 1
        rest = order[: self._places]
        rest = moved[rest[kept[rest]]]
        spans = ((number, *self._spans[number]) for number in numbers)
        self._spans = OrderedDict((number, (int(moved[start]), length)) for number, start, length in spans)
        left = tokens[: self._used][kept].clone()
        tokens[len(left) : self._used], order[len(rest) : self._places] = BEFORE, self._size - 1
        tokens[: len(left)], order[: len(rest)] = left, rest
        self._used, self._places = len(left), len(rest)

    def _insert(self, answer: Tensor) -> None:
        """Put an answer behind all others, and its places in between theirs."""
        start, depth = self._used, self.max_match
        self._master.tokens[start : start + len(answer)] = answer
        self._spans[self._added] = (start, len(answer))
        self._used = start + len(answer) + 1
        places = torch.arange(start, self._used - 2)
        windows = self._master.backwards(places, depth)
        sorting = np.lexsort(windows.flip(1).T.numpy())
        places, windows = places[sorting], windows[sorting]
        low, high = torch.zeros_like(places), torch.full_like(places, self._places)
        while (open := low < high).any():
            middle = (low + high) // 2
            less = _less(self._master.backwards(self._master.order[middle], depth), windows)
            low, high = torch.where(open & less, middle + 1, low), torch.where(open & ~less, middle, high)
        self._touch(low, windows)
        old = self._master.order[: self._places].numpy()
        self._places += len(places)
        merged = np.insert(old, low.numpy(), places.numpy())
        self._master.order[: self._places] = torch.from_numpy(merged)

    def _touch(self, ranks: Tensor, windows: Tensor) -> None:
        """Note the use of the answers that hold all tokens of one of `windows`, which rank at `ranks`."""
        near = self._master.order[torch.stack([ranks, ranks - 1]).clamp(0, self._size - 1)]
        whole = shared_tokens(self._master.backwards(near, self.max_match), windows) == self.max_match
        at = {number: start for number, (start, _) in self._spans.items()}
        by_start = sorted(at, key=at.__getitem__)
        starts = torch.tensor([at[number] for number in by_start])
        for owner in sorted(set((torch.searchsorted(starts, near[whole], right=True) - 1).tolist())):
            self._spans.move_to_end(by_start[owner])
        self._spans.move_to_end(self._added)

    def _copy(self) -> None:
        """Bring the tables of other devices up to date."""
        for table in self._tables.values():
            if table is not self._master:
                table.tokens.copy_(self._master.tokens)
                table.order.copy_(self._master.order)


def clear_memories(drafter: Drafter | None) -> None:
    """Empty the memories of a drafter that are not frozen."""
    for memory in memories_of(drafter):
        if not memory.frozen:
            memory.clear()


def memories_of(drafter: Drafter | None) -> Iterator[SuffixMemory]:
    """The memories that outlive a call which a drafter, or one inside it, reads."""
    return held_by(drafter, SuffixMemory)
