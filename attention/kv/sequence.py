"""One sequence of a page table: which pages it owns, which it has given back, and what may be done with its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class PagedSequence:
    """`length` tokens, of which the first `freed` pages after the first `front` ones have been given back.

    number: by which the table knows it, for messages.
    pages: the others, in order; a new tuple whenever they change.

    >>> sequence = PagedSequence(number=0, page_size=4, pages=(4, 2), length=11, freed=1)
    >>> sequence.block_table, sequence.slots([4, 8])
    ((4, 4, 2), [16, 8])
    >>> sequence.moves(start=5, path=[1, 4])
    [(6, 5), (9, 6)]
    """

    number: int
    page_size: int
    pages: tuple[int, ...] = ()
    length: int = 0
    freed: int = 0
    front: int = 0

    def __str__(self) -> str:
        freed = f", of which {self.freed * self.page_size} are freed" if self.freed else ""
        return f"sequence {self.number} of {self.length} tokens{freed}"

    @property
    def block_table(self) -> tuple[int, ...]:
        """A page for every place. A place whose page was given back names the first page that is left after it.

        Nobody sees its tokens any more, but whoever masks keys after reading them must read numbers there: 0 times a
        NaN is NaN."""
        if not self.freed:
            return self.pages
        first, rest = self.pages[: self.front], self.pages[self.front :]
        return (*first, *rest[:1] * self.freed, *rest)

    @property
    def held_places(self) -> list[tuple[int, int]]:
        """The places of the block table whose page has not been given back, each with its page."""
        return [(i + (self.freed if i >= self.front else 0), page) for i, page in enumerate(self.pages)]

    @property
    def places(self) -> int:
        """Places of the block table."""
        return self.freed + len(self.pages)

    @property
    def start(self) -> int:
        """The first token after what was given back."""
        return (self.front + self.freed) * self.page_size if self.freed else 0

    def slots(self, positions: Sequence[int]) -> list[int]:
        """The slot of each position. Raises ValueError for one that it does not hold."""
        size, pages, start, head = self.page_size, self.pages, self.start, self.front * self.page_size
        if (
            len(positions)
            and not 0 <= min(positions) <= max(positions) < self.length
            or any(head <= p < start for p in positions)
        ):
            raise ValueError(f"{self} holds no positions {min(positions)} to {max(positions)}")
        return [pages[p // size - (self.freed if p >= start else 0)] * size + p % size for p in positions]

    def require_length(self, length: int) -> None:
        """Raise ValueError where it cannot be truncated to `length`: the first page that is left stays, or none."""
        least = self.start + 1 if self.freed else 0
        if length != 0 and not least <= length <= self.length:
            raise ValueError(f"{self} cannot be truncated to {length}")

    def moves(self, start: int, path: Sequence[int]) -> list[tuple[int, int]]:
        """The moves (source, target) of tokens after which those of `path`, offsets from `start`, follow each other.

        Raises ValueError for a path that is not increasing or leaves the sequence."""
        inside = self.start <= start <= self.length and (not path or 0 <= path[0] <= path[-1] < self.length - start)
        if not inside or any(b <= a for a, b in zip(path, path[1:], strict=False)):
            raise ValueError(f"path {list(path)} from {start} is not an increasing path inside {self}")
        self.require_length(start + len(path))
        return [(start + offset, start + i) for i, offset in enumerate(path) if offset != i]

    def cut(self, length: int) -> tuple[int, ...]:
        """Keep the first `length` tokens -> the pages after them; see `require_length`."""
        self.require_length(length)
        kept = max(0, -(-length // self.page_size) - self.freed)
        dropped = self.pages[kept:]
        self.pages, self.length = self.pages[:kept], length
        self.freed, self.front = (self.freed, self.front) if length else (0, 0)
        return dropped

    def give_back(self, committed: int, window: int, front: int = 0) -> tuple[int, ...]:
        """Let go of the pages after the first `front` that no token after the first `committed` ones sees -> these.

        Each token sees the last `window` ones. The first page that stays after them is one of committed tokens only:
        all of it has been written. Raises ValueError for a `window` below 1, and a `committed` that the sequence does
        not hold."""
        if window < 1 or not 0 <= committed <= self.length:
            raise ValueError(f"{committed} committed tokens or a window of {window} do not fit {self}")
        size = self.page_size
        unseen = max(0, min((committed + 1 - window) // size, committed // size - 1) - front - self.freed)
        dropped = self.pages[front : front + unseen]
        if dropped:
            self.pages = self.pages[:front] + self.pages[front + unseen :]
            self.freed, self.front = self.freed + unseen, front
        return dropped

    def is_sound(self) -> bool:
        """Whether its pages differ, are those of its length, and one is left where some were given back."""
        whole = self.places == -(-self.length // self.page_size) and (len(self.pages) > self.front or not self.freed)
        return whole and len(set(self.pages)) == len(self.pages)
