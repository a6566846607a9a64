"""A synthetic control: a drafter whose acceptance is a dial. It tests loops and theory; its speed says nothing about
any real drafter.
"""

import torch
from torch import Tensor

from specdec.drafters.base import DrafterTraits
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import ModelState, require_same
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree


class SyntheticDrafter:
    """Drafts a chain of `num_tokens` that is right with probability `acceptance`, by running `model`, a twin of the
    target.

    It draws from q = a p + (1 - a) [w], a = `acceptance`, p the target's own distribution (greedily its best token) and
    w the token that p likes least. Each token is then accepted with probability a + (1 - a) p(w): always at a = 1, and
    at a = 0 only as often as the target would say w itself (greedily never). Raises ValueError for an acceptance
    outside [0, 1]."""

    def __init__(self, model, acceptance: float, num_tokens: int = 5):
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance must lie in [0, 1], got {acceptance}")
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self.runner = ModelRunner(model, mode="eager")
        self._acceptance, self.traits = acceptance, DrafterTraits(num_tokens, "chain", captured=True)

    @property
    def acceptance(self) -> float:
        """What it was told; another dial is another drafter."""
        return self._acceptance

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the model fits `target`."""
        require_same(self.runner, target)

    def start(self, rows: Rows, max_tokens: int) -> ModelDraftSession:
        """Begin to draft. Tokens are drawn at random with greedy decoding too."""

        do_sample = rows.do_sample

        def adjust(scores: Tensor) -> Tensor:
            p = (
                scores.softmax(-1)
                if do_sample
                else torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
            )
            wrong = torch.zeros_like(p).scatter_(-1, p.argmin(-1, keepdim=True), 1.0)
            return (self.acceptance * p + (1 - self.acceptance) * wrong).log()

        state, chain = ModelState(self.runner, rows, max_tokens), TokenTree.chain(self.traits.max_tokens)
        return ModelDraftSession(state, chain, True, adjust=adjust)
