"""Tokens that a feature-fed draft model predicts in parallel: one forward for the text and all slots ahead of it.

A slot stands for a token that is not known yet. What it predicts depends on the text and its place, not on the tokens
drafted before it, so that all nodes of a level have one distribution. Source: P-EAGLE (arXiv 2602.01469)."""

from collections.abc import Sequence

from torch import Tensor

from specdec.drafters.base import FeatureReader
from specdec.drafters.feature_state import Ahead, FeatureState
from specdec.model.feature_runner import FeatureRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree


class ParallelState:
    """A `DraftState` over a `FeatureState`: each proposal runs the text and what is `ahead` once.

    Drafts may be `1 + n` levels deep, with n slots ahead, and append `max_tokens` nodes to a row."""

    def __init__(self, runner: FeatureRunner, rows: Rows, max_tokens: int, ahead: Ahead):
        self._text, self._ahead = FeatureState(runner, rows, max(max_tokens, len(ahead[0]))), ahead
        self.runner, self.draft_room, self.reader = runner, self._text.draft_room, self._text
        self.pages_wanted, self.with_pages = self._text.pages_wanted, self._text.with_pages
        self._logits: Tensor | None = None  # [A, 1 + n, V]
        self._level = 0

    reader: FeatureReader | None

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        self._text.admit(rows, joining)

    def catch_up(self, batch: Batch) -> Tensor:
        """See `DraftState.catch_up`; the slots ahead run too."""
        self._logits, self._level = self.runner.logits(self._text.run_text(batch, self._ahead)[0]), 0
        return self._logits[:, 0]

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Do nothing: the sequences never fall behind."""

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """The logits of the next level's slot for each of `tokens [A, n]`, `[A, n, V]`: whatever they are."""
        assert self._logits is not None
        self._level += 1
        return self._logits[:, self._level, None].repeat(1, tokens.shape[1], 1)

    def end_proposal(self, batch: Batch) -> None:
        """Forget the logits; the slots stay in the cache until `truncate`."""
        self._logits = None

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """See `DraftState.truncate`."""
        self._text.truncate(rows, lengths)

    def prefix_sequence(self, row: Row) -> int | None:
        """See `DraftState.prefix_sequence`."""
        return self._text.prefix_sequence(row)

    def release(self, rows: Sequence[Row]) -> None:
        """See `DraftState.release`."""
        self._text.release(rows)
