"""Multi-branch rejection for children that were drawn independently: each in turn is accepted or taken out of what is left of p.

At a node with target distribution p and draft distribution q, let r = p. For each child x in order: accept it with probability
min(1, r(x) / q(x)); else r <- norm(max(r - q, 0)). When no child is left, the next token is drawn from r. With one child a node this
is rejection sampling on a chain. Source: Miao et al. 2024 (SpecInfer), Algorithm 2 (multi-step speculative sampling), Theorem 4.2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance, descend
from specdec.draft import Draft
from specdec.noise import RoundNoise, Stream
from specdec.sampling import draw, residual


def tree_iid(draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
    """See the module's docstring. Raises ValueError for children drawn without replacement or chosen deterministically."""
    if (draft.probs is None and draft.tree.size > 1) or (draft.distinct and not draft.tree.is_chain):  # lone children are both
        raise ValueError(f"tree_iid is for children drawn independently, got {'distinct' if draft.distinct else 'deterministic'} ones")
    return one_child_after_the_other(draft, scores, noise, lambda q, token: q)


def one_child_after_the_other(draft: Draft, scores: Tensor, noise: RoundNoise, after_rejection: Callable[[Tensor, Tensor], Tensor]) -> Acceptance:
    """The loop over the children of each node; `after_rejection(q [B, V], token [B])` is what the next child was drawn from."""
    tables, row = draft.tables, torch.arange(scores.shape[0], device=scores.device)
    branches = tables.children.shape[2]
    uniform = noise.uniform(Stream.ACCEPT, max(1, draft.max_depth * branches))

    def choose(node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        rest = scores[row, node].softmax(-1)
        chosen = torch.zeros_like(node)
        if depth == draft.max_depth:
            return chosen, rest
        q = draft.probs[row, tables.internal[0, node]]
        for branch in range(branches):
            child = tables.children[0, node, branch]
            token = draft.tokens[row, child]
            offered = (chosen == 0) & (child > 0) & tables.valid.expand_as(draft.tokens)[row, child]
            ratio = uniform[:, depth * branches + branch] * q.gather(1, token[:, None])[:, 0]
            accepted = offered & (ratio < rest.gather(1, token[:, None])[:, 0])  # u < r / q without the division
            chosen = torch.where(accepted, child, chosen)
            rejected = (offered & ~accepted)[:, None]
            rest = torch.where(rejected, residual(rest, q), rest)
            q = torch.where(rejected, after_rejection(q, token), q)
        return chosen, rest

    end, weights = descend(draft, choose)
    return Acceptance.at(draft, end, draw(weights, noise.uniform(Stream.NEXT, 1)[:, 0]))
