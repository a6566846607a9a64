"""Multi-branch rejection for children drawn independently: each is accepted, or its q subtracted from p.

At a node with target distribution p and draft distribution q, let r = p. For each child x in order: accept it with
probability min(1, r(x) / q(x)); else r <- norm(max(r - q, 0)). When no child is left, the next token is drawn from r.
With one child a node this is rejection sampling on a chain. Source: Miao et al. 2024 (SpecInfer), Algorithm 2
(multi-step speculative sampling), Theorem 4.2."""

from dataclasses import replace

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance, descend
from specdec.sampling.draws import draw, residual, totals_of
from specdec.sampling.noise import RoundNoise, Stream
from specdec.sampling.warped import Scores, as_unwritten
from specdec.trees.draft import Draft


def tree_iid(draft: Draft, scores: Scores, noise: RoundNoise) -> Acceptance:
    """Verify a tree of independent children; raises ValueError for distinct or deterministic ones."""
    distinct = draft.distinct and not draft.tree.is_chain  # an only child is both
    if distinct or (draft.probs is None and draft.tree.size > 1):
        given = "distinct" if draft.distinct else "deterministic"
        raise ValueError(f"tree_iid is for children drawn independently, got {given} ones")
    return child_by_child(draft, scores, noise)


def child_by_child(draft: Draft, scores: Scores, noise: RoundNoise, impl: str | None = None) -> Acceptance:
    """Try the children of each node in order; if they are distinct, rejected ones are removed from q too.

    q is kept as weights and their sum, because without its likeliest token a confident q is below 1e-38, where float32
    has few digits: dividing would round it to another distribution."""
    totals = draft.totals
    if draft.probs is not None and totals is None:
        totals = totals_of(draft.probs)[0]
    if (unwritten := as_unwritten(scores, impl)) is not None:
        from specdec.acceptance.walk_kernel import launch_walk

        draft = replace(draft, totals=totals)
        return launch_walk(draft, unwritten, noise)
    assert isinstance(scores, Tensor)
    tables, row = draft.tables, torch.arange(scores.shape[0], device=scores.device)
    branches = tables.children.shape[2]
    uniform = noise.uniform(Stream.ACCEPT, max(1, draft.max_depth * branches))
    internal, children = (x.expand(len(row), *x.shape[1:]) for x in (tables.internal, tables.children))

    def choose(node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        rest = scores[row, node].softmax(-1)
        chosen = torch.zeros_like(node)
        if draft.probs is None or depth == draft.max_depth:
            return chosen, rest
        assert totals is not None
        inner = internal[row, node]
        q, total = draft.probs[row, inner], totals[row, inner, None]
        for branch in range(branches):
            child = children[row, node, branch]
            token = draft.tokens[row, child][:, None]
            offered = (chosen == 0) & (child > 0) & tables.valid.expand_as(draft.tokens)[row, child]
            weight = q.gather(1, token)
            # u < r / (weight / total) without the divisions
            accepted = (uniform[:, depth * branches + branch, None] * weight < rest.gather(1, token) * total)[:, 0]
            chosen = torch.where(offered & accepted, child, chosen)
            rejected = (offered & ~accepted)[:, None]
            rest = torch.where(rejected, residual(rest, q / total.to(q.dtype)), rest)
            if draft.distinct and branch + 1 < branches:
                q = q.scatter(1, token, torch.where(rejected, 0.0, weight))
                total = q.sum(-1, keepdim=True, dtype=torch.float64)
        return chosen, rest

    end, weights = descend(draft, choose)
    return Acceptance.at(draft, end, draw(weights, noise.uniform(Stream.NEXT, 1)[:, 0]))
