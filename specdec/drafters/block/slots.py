"""What a drafter gives that predicts all slots of a block in one pass: the slots' logits, and those after any token."""

from typing import NamedTuple, Protocol

from torch import Tensor

from specdec.drafters.base import DraftState
from specdec.requests.batch import Batch


class Factors(NamedTuple):
    """Conditional logits as a sum: own[a, t] + vectors[chosen[a, j]] . weight[t] at node j of row a, for draft token t.

    own [A, V']: the slot's logits by themselves; vectors [X, r]; chosen [A, n] int64; weight [V', r]."""

    own: Tensor
    vectors: Tensor
    chosen: Tensor
    weight: Tensor


class SlotState(DraftState, Protocol):
    """A `DraftState` of which one pass predicts K tokens ahead. V': tokens that it drafts.

    A tree of any size grows out of this pass: `slots` runs it, and `conditional` adds to the logits of a slot what the
    tokens before it say, without another one. Neither waits for the device, so that captured rounds call both."""

    @property
    def ids(self) -> Tensor | None:
        """`[V']` int64: the target's ids of the tokens that it drafts (None: its vocabulary is the target's)."""

    def slots(self, batch: Batch) -> Tensor:
        """Run what the cache lacks of the text, and the block after it -> unary logits `[A, K, V']` of its slots.

        Slot k predicts token k + 1 after each row's last token, for whatever tokens come between them. It replaces
        `DraftState.catch_up` in a round; `DraftState.end_proposal` ends it."""

    def conditional(self, level: int, tokens: Tensor, among: Tensor | None = None,
                    above: Tensor | None = None) -> Tensor:  # fmt: skip
        """The logits of slot `level`, from 0 on, at nodes that hold `tokens [A, n]`, after `slots` -> `[A, n, V']`.

        level: depth of these nodes; at level 0 they are the roots, which hold the last tokens of the text.
        tokens: ids of the target.
        among `[A, M]` int64: draft tokens, of 0 to V' - 1, for which alone logits are wanted -> `[A, n, M]`.
        above `[A, n]` int64: below which nodes these are, of those that the last call for the level before was given
            (None: at level 0). Drafters read it whose distributions depend on all tokens of the block before.

        Where the token before makes no difference, as for a drafter of marginals, the result is `[A, 1, V' or M]`."""

    def factors(self, level: int, tokens: Tensor) -> Factors | None:
        """What `conditional` adds up at nodes that hold `tokens [A, n]`; None where it is no such sum."""
