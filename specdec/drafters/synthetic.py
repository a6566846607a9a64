"""A drafter with a chosen acceptance, to test loops and theory; its speed says nothing about real drafters."""

import torch
from torch import Tensor

from specdec.drafters.base import DrafterTraits
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import ModelState, require_equal
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree


class SyntheticDrafter:
    """Drafts a chain of `num_tokens`, each right with probability `acceptance`, by running `model`, the target's twin.

    It draws from q = a p + (1 - a) [w], where a = `acceptance`, p is the target's own distribution (with greedy
    decoding its best token) and w the least likely token of p. Each token is then accepted with probability
    a + (1 - a) p(w). Raises ValueError for an acceptance outside [0, 1]."""

    def __init__(self, model, acceptance: float, num_tokens: int = 5):
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance must lie in [0, 1], got {acceptance}")
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self.runner = ModelRunner(model, mode="eager")
        self._acceptance = acceptance
        self.traits = DrafterTraits(num_tokens, "chain", captured=True, max_length=self.runner.max_positions)

    @property
    def acceptance(self) -> float:
        """The chosen acceptance, which cannot be changed."""
        return self._acceptance

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the model fits `target`."""
        require_equal("vocabulary size", self.runner.vocab_size, target.vocab_size)
        require_equal("dtype", self.runner.dtype, target.dtype)

    def start(self, rows: Rows, max_tokens: int) -> ModelDraftSession:
        """Begin to draft; tokens are drawn at random with greedy decoding too."""
        do_sample = rows.do_sample
        point_mass = lambda like, token: torch.zeros_like(like).scatter_(-1, token, 1.0)

        def adjust(scores: Tensor) -> Tensor:
            p = scores.softmax(-1) if do_sample else point_mass(scores, scores.argmax(-1, keepdim=True))
            wrong = point_mass(p, p.argmin(-1, keepdim=True))
            return (self.acceptance * p + (1 - self.acceptance) * wrong).log()

        state, chain = ModelState(self.runner, rows, max_tokens), TokenTree.chain(self.traits.max_tokens)
        return ModelDraftSession(state, chain, True, adjust=adjust, max_length=self.traits.max_length)
