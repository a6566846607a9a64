"""Greedy acceptance: follow the tree as long as it holds the target's own most likely token. The output is the target's greedy output."""

from torch import Tensor

from specdec.acceptance.base import Acceptance, deepest
from specdec.draft import Draft
from specdec.noise import RoundNoise
from specdec.sampling import best


def greedy(draft: Draft, scores: Tensor, noise: RoundNoise | None = None) -> Acceptance:
    """Accept the longest path whose every token is the argmax at its parent; the next token is the argmax at the path's end.

    Source: Leviathan et al. 2023, section 2.3 (temperature 0); for trees Miao et al. 2024 (SpecInfer). `noise` is not used.
    """
    likely = best(scores)  # [B, N]
    if draft.tree.size == 1:
        return Acceptance.of_nothing(draft, likely[:, 0])
    right = draft.tokens == likely.gather(1, draft.tables.parent.expand_as(likely))
    end = deepest(draft, right)
    return Acceptance.at(draft, end, likely.gather(1, end[:, None])[:, 0])
