"""Proposes best-first trees, of the likeliest tokens or of drawn ones."""

from collections.abc import Sequence

from specdec.drafters.block.best_first import best_first
from specdec.drafters.block.drawn import drawn_tree
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.scoring import SlotScores
from specdec.drafters.block.slots import SlotState
from specdec.drafters.reach import propose_within
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


class BestFirstSession:
    """A `DraftSession` whose trees grow as `growth` says, or as large as `Batch.nodes`, out of one pass a round.

    sample: whether tokens are drawn from the draft's own distributions, see `drawn`, rather than the likeliest ones.
    max_length: see `DrafterTraits`."""

    def __init__(self, state: SlotState, growth: Growth, sample: bool = False, max_length: int | None = None):
        self.states, self._state, self._growth = (state,), state, growth
        self._sample, self._max_length = sample, max_length
        self.reads = () if state.reader is None else state.reader.reads

    def min_length(self, tree: TokenTree | None) -> int:
        """See `DraftSession.min_length`: a captured round runs the whole accepted path again."""
        reader = self._state.reader
        return self._growth.depth + 1 if reader is None else reader.min_length

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """A tree for every row whose text is not too long; nothing before there are the features that it reads.

        Raises ValueError for a shape that does not grow."""
        if tree is not None:
            raise ValueError(f"best-first trees grow: there is none of the parents {tree.parents}")
        if self._state.reader is not None and batch.features is None:
            return Draft(TokenTree.chain(0), batch.last_tokens())
        growth = self._growth if batch.nodes is None else self._growth.of_size(batch.nodes)
        return propose_within(batch, self._max_length, lambda short: self._grow(short, growth))

    def _grow(self, batch: Batch, growth: Growth) -> Draft:
        scores = SlotScores.of(batch, self._state, growth.depth, growth.candidates)
        draft = (drawn_tree if self._sample else best_first)(batch, scores, growth)
        self._state.end_proposal(batch)
        return draft

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        self._state.admit(rows, joining)

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Drop the block; the accepted tokens run in the next round."""
        self._state.truncate(batch.members, [row.length_before for row in batch.members])

    def release(self, rows: Sequence[Row]) -> None:
        """Give the rows' pages back."""
        self._state.release(rows)
