"""Multi-branch rejection for children drawn without replacement: no branch repeats a token tried before.

As for independent children (`tree_iid`), but once x is rejected the next child was drawn from q without x: r <-
norm(max(r - q, 0)) and then q <- norm(q with q(x) = 0). Source: Chen et al. 2024 (Sequoia), Algorithm 2; Jeon et al.
2024 (RSD)."""

from specdec.acceptance.base import Acceptance
from specdec.acceptance.tree_iid import child_by_child
from specdec.sampling.noise import RoundNoise
from specdec.sampling.warped import Scores
from specdec.trees.draft import Draft


def tree_distinct(draft: Draft, scores: Scores, noise: RoundNoise) -> Acceptance:
    """Verify a tree of distinct children; raises ValueError for independent or deterministic ones."""
    if (draft.probs is None and draft.tree.size > 1) or not (draft.distinct or draft.tree.is_chain):
        given = "deterministic" if draft.probs is None else "independent"
        raise ValueError(f"tree_distinct is for children drawn without replacement, got {given} ones")
    return child_by_child(draft, scores, noise)
