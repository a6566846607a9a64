"""Greedy acceptance: follow the tree as long as it holds the target's own most likely token. The output is the target's greedy output."""

from torch import Tensor

from specdec.acceptance.base import Acceptance
from specdec.draft import Draft
from specdec.noise import RoundNoise
from specdec.tree import tree_tensors


def greedy(draft: Draft, scores: Tensor, noise: RoundNoise | None = None) -> Acceptance:
    """Accept the longest path whose every token is the argmax at its parent; the next token is the argmax at the path's end.

    Source: Leviathan et al. 2023, section 2.3 (temperature 0); for trees Miao et al. 2024 (SpecInfer). `noise` is not used.
    """
    tables = tree_tensors(draft.tree, draft.tokens.device)
    best = scores.argmax(-1)  # [B, N]
    right = draft.tokens.clone()
    right[:, 1:] = best[:, tables.parent]
    right = right == draft.tokens  # the root is right by definition
    on_path = (right[:, None] | ~tables.sees).all(-1)  # [B, N]: the node and all its ancestors are right
    end = (on_path * (tables.depth + 1)).argmax(1)  # siblings differ, so one deepest node
    return Acceptance(tables.depth[end], tables.path[end], best.gather(1, end[:, None])[:, 0])
