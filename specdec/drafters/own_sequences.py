"""The sequences that rows have in the cache of a draft model of their own."""

from collections.abc import Callable, Sequence

from specdec.model.round_runner import RoundRunner
from specdec.requests.rows import Row


class OwnSequences:
    """One sequence of `runner`'s cache for each row.

    room: `room(length)`, the tokens that the sequence of a text of `length` tokens may hold in a round.
    """

    def __init__(self, runner: RoundRunner, room: Callable[[int], int]):
        self._runner, self._room = runner, room
        self._sequences: dict[Row, int] = {}

    def add(self, joining: Sequence[Row]) -> None:
        """Begin sequences for rows, up to whose limits there is to be room."""
        self._runner.reserve([self._room(row.limit) for row in joining])
        self._sequences |= {row: self._runner.cache.add() for row in joining}

    def of(self, rows: Sequence[Row]) -> list[int]:
        """The sequences of `rows`."""
        return [self._sequences[row] for row in rows]

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Keep at most the first `lengths` tokens of each sequence."""
        cache = self._runner.cache
        for sequence, length in zip(self.of(rows), lengths, strict=True):
            cache.truncate(sequence, min(cache.length(sequence), length))

    def pages_wanted(self, row: Row) -> int:
        """See `DraftState.pages_wanted`: those of its text and the drafted nodes."""
        cache, sequence = self._runner.cache, self._sequences[row]
        return cache.pages_for(self._room(row.reach)) - len(cache.pages(sequence))

    def with_pages(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
        """See `DraftState.with_pages`."""
        sequences = self.of(rows)
        self._runner.cache.extend_to(sequences, [self._room(length) for length in lengths])
        return sequences

    def release(self, rows: Sequence[Row]) -> None:
        """See `DraftState.release`."""
        for row in rows:
            self._runner.cache.free(self._sequences.pop(row))
