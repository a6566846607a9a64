"""Rejection sampling on a chain: the output is distributed exactly as the target's own samples.

For the drafted tokens in order, x ~ q is accepted with probability min(1, p(x) / q(x)). At the first rejection the next
token is drawn from norm(max(p - q, 0)); when all are accepted, from p after the last one. A deterministic draft is a
point mass: q(x) = 1. Source: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2."""

from dataclasses import replace

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance
from specdec.sampling.draws import draw, residual, sample
from specdec.sampling.noise import RoundNoise, Stream
from specdec.sampling.warped import Scores, as_unwritten
from specdec.trees.draft import Draft


def rejection(draft: Draft, scores: Scores, noise: RoundNoise, impl: str | None = None) -> Acceptance:
    """Verify a chain, of which rows may lack the end; see the module's docstring. Raises ValueError for other trees."""
    require_chain(draft, "rejection")
    length, next_uniform = draft.tree.size - 1, noise.uniform(Stream.NEXT, 1)
    if length == 0:
        return Acceptance.of_nothing(draft, sample(scores, next_uniform, impl)[:, 0])
    if (unwritten := as_unwritten(scores, impl)) is not None:
        from specdec.acceptance.walk_kernel import launch_walk

        return launch_walk(replace(draft, totals=None), unwritten, noise)  # p and q are compared as they are
    assert isinstance(scores, Tensor)
    p = scores.softmax(-1)  # [B, γ + 1, V]
    rows = torch.arange(p.shape[0], device=p.device)
    p_drafted, q_drafted, exists = on_chain(draft, p)
    accepted = (noise.uniform(Stream.ACCEPT, length) * q_drafted < p_drafted) & exists  # u < p / q without the division
    counts = accepted.long().cumprod(1).sum(1)
    at_end = p[rows, counts]
    rejected = counts.clamp(max=length - 1)
    lacking = residual(at_end, proposed_from(draft, at_end, rejected))
    weights = torch.where((counts < exists.sum(1))[:, None], lacking, at_end)
    return Acceptance.at(draft, counts, draw(weights, next_uniform[:, 0]))


def require_chain(draft: Draft, rule: str) -> None:
    """Raise ValueError unless the draft is a chain."""
    if not draft.tree.is_chain:
        raise ValueError(f"{rule} verifies chains, got a tree with parents {draft.tree.parents}")


def on_chain(draft: Draft, p: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
    """p(x), q(x) (1 for a deterministic draft) and whether the row has x, each `[B, γ]`, for the drafted tokens x."""
    drafted = draft.tokens[:, 1:]
    q = 1.0 if draft.probs is None else draft.probs.gather(2, drafted[..., None])[..., 0]
    return p[:, :-1].gather(2, drafted[..., None])[..., 0], q, draft.tables.valid[:, 1:].expand_as(drafted)


def proposed_from(draft: Draft, like: Tensor, place: Tensor) -> Tensor:
    """`[B, V]`: the distribution that drafted token number `place [B]` (from 0) was drawn from."""
    rows = torch.arange(len(place), device=place.device)
    if draft.probs is not None:
        return draft.probs[rows, place]
    return torch.zeros_like(like).scatter_(1, draft.tokens[rows, place + 1][:, None], 1.0)
