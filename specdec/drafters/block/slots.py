"""What grows a tree out of one pass: logits of slots, and those that follow given the token before."""

from typing import Protocol

from torch import Tensor

from specdec.requests.batch import Batch


class SlotLogits(Protocol):
    """K slots after each row's text, all computed by one pass. A: rows; V: the target's tokens.

    Slot k predicts the token k + 1 places after the text's last one, at level k + 1 of a tree."""

    def slots(self, batch: Batch) -> Tensor:
        """Run the pass -> the logits of each slot by itself, `[A, K, V]`: without what the tokens before it say."""

    def conditional(self, level: int, tokens: Tensor) -> Tensor:
        """The logits of slot `level` after each of `tokens [A, n]` at the slot before, `[A, n, V]`.

        Those of slot 0 follow the text's last token. Only after `slots`, until the proposal ends; where the logits do
        not depend on tokens, those of `slots` for each."""
