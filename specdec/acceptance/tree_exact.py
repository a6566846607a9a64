"""Exact acceptance for deterministic trees (Medusa, EAGLE, prompt lookup), with one draw per node.

At each node draw y ~ p, the target's own distribution there. If a child holds y, go there; if not, y is the next token.
Every emitted token is thus a draw from the target, whatever the tree offers. The draws must be independent: a single
number for a whole path would accept too often. Each draw takes the number that a plain step would take at that place of
the text, so that a seed gives one text whatever is drafted, or nothing. Source: the point-mass case of Leviathan et al.
2023, Algorithm 1, node by node; Xia et al. 2024 (Spec-Bench survey), section 5."""

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance, descend
from specdec.acceptance.greedy import accept_likely
from specdec.sampling.draws import draw, sample
from specdec.sampling.noise import RoundNoise
from specdec.sampling.warped import Scores, Warped
from specdec.trees.draft import Draft


def tree_exact(draft: Draft, scores: Scores, noise: RoundNoise) -> Acceptance:
    """Verify a deterministic tree; raises ValueError for a draft whose tokens were drawn at random."""
    if draft.probs is not None:
        raise ValueError("tree_exact is for deterministic drafts, but this one carries the distribution of its tokens")
    uniform = noise.along(draft.max_depth + 1)  # a number for each depth
    if isinstance(scores, Warped) or scores.is_cuda:  # a token for every node: cheaper there than a pass a depth
        of_node = uniform.gather(1, draft.tables.depth.expand(len(uniform), -1))
        return accept_likely(draft, sample(scores, of_node))
    tables, row = draft.tables, torch.arange(scores.shape[0], device=scores.device)
    place = torch.arange(draft.tree.size, device=scores.device)

    def choose(node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        token = draw(scores[row, node].softmax(-1), uniform[:, depth])
        holds = (tables.parent == node[:, None]) & tables.valid & (place > 0) & (draft.tokens == token[:, None])
        return holds.long().argmax(1), token  # 0, the root, where none does

    return Acceptance.at(draft, *descend(draft, choose))
