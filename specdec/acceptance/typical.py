"""Typical acceptance: accept tokens that the target finds likely enough. NOT lossless.

A token x passes when p(x) > min(ε, δ exp(-H(p))), p being the target's distribution at its parent and H the entropy in
nats: where the target is unsure, less likely tokens pass. The longest path of passing tokens is accepted, of several
the likeliest; the next token is the argmax at its end. Source: Cai et al. 2024 (Medusa), section 2.3.1; Hewitt et al.
2022 for the threshold."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance, deepest
from specdec.sampling.noise import RoundNoise
from specdec.trees.draft import Draft


@dataclass(frozen=True, slots=True)
class Typical:
    """The rule with thresholds ε = `epsilon` and δ = `delta`; raises ValueError unless both lie in (0, 1]."""

    epsilon: float = 0.09
    delta: float = 0.3
    lossless: ClassVar[bool] = False

    def __post_init__(self):
        if not (0 < self.epsilon <= 1 and 0 < self.delta <= 1):
            raise ValueError(f"epsilon and delta must lie in (0, 1], got {self.epsilon} and {self.delta}")

    def __call__(self, draft: Draft, scores: Tensor, noise: RoundNoise | None = None) -> Acceptance:
        """Accept the longest path of tokens that pass; `noise` is not used."""
        tables, log_p = draft.tables, scores.log_softmax(-1)
        parent = tables.parent.expand_as(draft.tokens)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # p log p is 0 where p is
        threshold = (self.delta * (-entropy).exp()).clamp(max=self.epsilon).gather(1, parent)
        log_token = log_p[torch.arange(len(parent), device=parent.device)[:, None], parent, draft.tokens]
        log_token = torch.where(torch.arange(draft.tree.size, device=parent.device) == 0, 0.0, log_token)
        along_path = (tables.sees * log_token.clamp(min=-1e4)[:, None]).sum(-1)
        end = deepest(draft, log_token.exp() > threshold, along_path)
        return Acceptance.at(draft, end, scores.argmax(-1).gather(1, end[:, None])[:, 0])
