"""The negative control: a wrong acceptance rule, wrong by as much as an audit claims to find."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance
from specdec.sampling.draws import draw
from specdec.sampling.noise import RoundNoise, Stream
from specdec.trees.draft import Draft


@dataclass(frozen=True, slots=True)
class WrongRule:
    """Refuses every draft, and draws one token from the target's distribution moved by a total variation.

    variation: the probability that goes from all other tokens, in proportion, to the likeliest one, as far as they have
        so much. Raises ValueError unless it lies in (0, 1].
    """

    variation: float
    lossless: ClassVar[bool] = False

    def __post_init__(self):
        if not 0 < self.variation <= 1:
            raise ValueError(f"variation must lie in (0, 1], got {self.variation}")

    def __call__(self, draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
        """Emit one token a round."""
        p = scores[:, 0].double().softmax(-1)
        best = p.argmax(-1, keepdim=True)
        others = 1 - p.gather(1, best)
        share = (self.variation / others.clamp(min=1e-12)).clamp(max=1.0)
        moved = (p * (1 - share)).scatter_add(1, best, share)
        root = torch.zeros(len(p), dtype=torch.int64, device=p.device)
        return Acceptance.at(draft, root, draw(moved, noise.uniform(Stream.NEXT, 1)[:, 0]))
