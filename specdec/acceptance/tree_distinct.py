"""Multi-branch rejection for children that were drawn without replacement, so that no branch is wasted on a token tried
before.

As for independent children (`tree_iid`), but once x is rejected the next child was drawn from q without x: r <-
norm(max(r - q, 0)) and then q <- norm(q with q(x) = 0). Source: Chen et al. 2024 (Sequoia), Algorithm 2; Jeon et al.
2024 (RSD)."""

from torch import Tensor

from specdec.acceptance.base import Acceptance
from specdec.acceptance.tree_iid import one_child_after_the_other
from specdec.sampling.noise import RoundNoise
from specdec.trees.draft import Draft


def tree_distinct(draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
    """See the module's docstring. Raises ValueError for children drawn independently or chosen deterministically."""
    if (draft.probs is None and draft.tree.size > 1) or not (draft.distinct or draft.tree.is_chain):
        raise ValueError(
            "tree_distinct is for children drawn without replacement, got "
            f"{'deterministic' if draft.probs is None else 'independent'} ones"
        )
    return one_child_after_the_other(draft, scores, noise)
