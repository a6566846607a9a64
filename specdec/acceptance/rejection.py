"""Rejection sampling on a chain: the output is distributed exactly as the target's own samples.

For the drafted tokens in order, x ~ q is accepted with probability min(1, p(x) / q(x)). At the first rejection the next token is drawn
from norm(max(p - q, 0)); when all are accepted, from p after the last one. A deterministic draft is a point mass: q(x) = 1.
Source: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2.
"""

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance
from specdec.draft import Draft
from specdec.noise import RoundNoise, Stream
from specdec.sampling import draw
from specdec.tree import tree_tensors


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Weights `[B, V]` of the token that replaces a rejected one: max(p - q, 0), or p where the two are equal (nothing to reject)."""
    rest = (p - q).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def rejection(draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
    """See the module's docstring. `draft.tree` must be a chain; raises ValueError for any other tree."""
    if not draft.tree.is_chain:
        raise ValueError(f"rejection sampling verifies chains, got a tree with parents {draft.tree.parents}")
    p = scores.softmax(-1)  # [B, γ + 1, V]
    length, device = draft.tree.size - 1, p.device
    rows = torch.arange(p.shape[0], device=device)
    next_uniform = noise.uniform(Stream.NEXT, 1)[:, 0]
    if length == 0:
        return Acceptance(torch.zeros_like(rows), draft.tokens[:, :0], draw(p[:, 0], next_uniform))
    drafted = draft.tokens[:, 1:]
    p_drafted = p[:, :-1].gather(2, drafted[..., None])[..., 0]
    q_drafted = 1.0 if draft.probs is None else draft.probs.gather(2, drafted[..., None])[..., 0]
    accepted = noise.uniform(Stream.ACCEPT, length) * q_drafted < p_drafted  # u < p / q without the division
    counts = accepted.long().cumprod(1).sum(1)
    at_end = p[rows, counts]
    rejected = counts.clamp(max=length - 1)
    if draft.probs is None:
        q_rejected = torch.zeros_like(at_end).scatter_(1, drafted[rows, rejected][:, None], 1.0)
    else:
        q_rejected = draft.probs[rows, rejected]
    weights = torch.where((counts < length)[:, None], residual(at_end, q_rejected), at_end)
    path = tree_tensors(draft.tree, device).path[counts]
    return Acceptance(counts, path, draw(weights, next_uniform))
