"""Acceptance rules, one file each: which drafted tokens stay, and which token follows them.

| rule | draft | output |
|---|---|---|
| `greedy` | any tree | the target's greedy output |
| `rejection`, `block` | chain | exact sample |
| `tree_iid`, `tree_distinct` | tree with children drawn with / without replacement | exact sample |
| `tree_exact` | any deterministic tree | exact sample |
| `lossless` | any draft: the rule above that fits how it was drawn | exact sample |
| `Typical` | any tree | not lossless |
"""

from specdec.acceptance.base import Acceptance, AcceptanceRule
from specdec.acceptance.block import block
from specdec.acceptance.greedy import greedy
from specdec.acceptance.rejection import rejection
from specdec.acceptance.tree_distinct import tree_distinct
from specdec.acceptance.tree_exact import tree_exact
from specdec.acceptance.tree_iid import tree_iid
from specdec.acceptance.typical import Typical
from specdec.sampling.noise import RoundNoise
from specdec.sampling.warped import Scores
from specdec.trees.draft import Draft

__all__ = [
    "Acceptance", "AcceptanceRule", "Typical", "block", "greedy", "lossless", "rejection", "tree_distinct",
    "tree_exact", "tree_iid",
]  # fmt: skip


def lossless(draft: Draft, scores: Scores, noise: RoundNoise) -> Acceptance:
    """Sample exactly for any draft, by the rule that fits how its tokens were drawn."""
    if draft.tree.is_chain:
        return rejection(draft, scores, noise)
    if draft.probs is None:
        return tree_exact(draft, scores, noise)
    return (tree_distinct if draft.distinct else tree_iid)(draft, scores, noise)
