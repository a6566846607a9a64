"""The signature that all acceptance rules share."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.noise import RoundNoise


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The verdict on a draft: `counts [B]` accepted nodes, `path [B, E]` those nodes from depth 1 on (zeros behind), `next_tokens [B]`."""

    counts: Tensor
    path: Tensor
    next_tokens: Tensor

    def emitted(self, draft: Draft) -> Tensor:
        """`[B, E + 1]`: the accepted tokens, then the next token; what stands behind it has no meaning."""
        accepted = draft.tokens.gather(1, self.path)
        place = torch.arange(accepted.shape[1] + 1, device=accepted.device)
        padded = torch.nn.functional.pad(accepted, (0, 1))
        return torch.where(place == self.counts[:, None], self.next_tokens[:, None], padded)


class AcceptanceRule(Protocol):
    """`rule(draft, scores [B, N, V], noise) -> Acceptance`; `scores[b, n]` are the target's processed logits after node n."""

    def __call__(self, draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
        """The verdict on `draft`."""
