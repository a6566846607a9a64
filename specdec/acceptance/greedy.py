"""Greedy acceptance: accept drafted tokens while they are the target's most likely ones.

The output is the target's greedy output."""

from torch import Tensor

from attention.dispatch import resolve
from specdec.acceptance.base import Acceptance, deepest
from specdec.sampling.draws import best
from specdec.sampling.noise import RoundNoise
from specdec.trees.draft import Draft


def greedy(draft: Draft, scores: Tensor, noise: RoundNoise | None = None) -> Acceptance:
    """Accept the longest path on which every token is the argmax at its parent, then emit the argmax at its end.

    `noise` is not used. Source: Leviathan et al. 2023, section 2.3 (temperature 0); for trees Miao et al. 2024
    (SpecInfer)."""
    return accept_likely(draft, best(scores))


def accept_likely(draft: Draft, likely: Tensor, impl: str | None = None) -> Acceptance:
    """Accept the longest path on which every token equals `likely [B, N]` at its parent."""
    if draft.tree.size == 1:
        return Acceptance.of_nothing(draft, likely[:, 0])
    tables = draft.tables
    if resolve(impl, likely.device) == "triton":
        from specdec.acceptance.greedy_kernel import launch_follow

        return Acceptance(*launch_follow(draft.tokens, likely, tables.parent, tables.path, tables.depth, tables.valid))
    end = deepest(draft, draft.tokens == likely.gather(1, tables.parent.expand_as(likely)))
    return Acceptance.at(draft, end, likely.gather(1, end[:, None])[:, 0])
