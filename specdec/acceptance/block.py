"""Block verification of a chain: accept drafted tokens jointly, never fewer in expectation than one after the other,
with the same output.

Let P_0 = 1 and P_i = min(P_(i-1) p(x_i) / q(x_i), 1). With the mass that p, scaled by P_i, still lacks behind x_i,

    w_i = sum_x max(P_i p(x | x_1..i) - q(x | x_1..i), 0)        h_i = w_i / (w_i + 1 - P_i)   for i < γ,   h_γ = P_γ

the longest prefix i with u_i <= h_i is accepted, each i by a number of its own. The next token is drawn from
norm(max(P_i p - q, 0)) after i < γ tokens and from p after all. Source: Sun et al. 2024 (Block verification), Algorithm
2, Theorem 1."""

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance
from specdec.acceptance.rejection import on_chain, rejection, require_chain
from specdec.sampling.draws import draw, residual
from specdec.sampling.noise import RoundNoise, Stream
from specdec.trees.draft import Draft


def block(draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
    """See the module's docstring. `draft.tree` must be a chain, of which a row may lack the end; raises ValueError for
    any other tree.

    A deterministic draft gains nothing from blocks and is verified by `rejection`.
    """
    require_chain(draft, "block verification")
    if draft.probs is None:
        return rejection(draft, scores, noise)
    p = scores.softmax(-1)  # [B, γ + 1, V]
    length, rows = draft.tree.size - 1, torch.arange(p.shape[0], device=p.device)
    p_drafted, q_drafted, exists = on_chain(draft, p)
    ratio = torch.where(
        exists, p_drafted.double() / q_drafted, 0.0
    )  # float64: p / 1e-45 is no float32, and 0 times infinity no number
    joint = [torch.ones_like(ratio[:, 0])]  # P_0, …, P_γ
    for i in range(length):
        joint.append((joint[-1] * ratio[:, i]).clamp(max=1))
    joint = torch.stack(joint, 1).to(p.dtype)
    # q after the last token that a row has is nothing: w = P and h = P there, and the next token comes from p
    q = torch.cat([torch.where(exists[..., None], draft.probs, 0.0), torch.zeros_like(p[:, :1])], 1)
    lacking = (joint[..., None] * p - q).clamp(min=0).sum(-1)  # [B, γ + 1]
    last = torch.arange(length + 1, device=p.device) == exists.sum(1, keepdim=True)
    behind = lacking + (
        1 - joint
    )  # in this order: 1 swallows what little may be lacking, and at P = 1 the two are equal
    h = torch.where(last, joint, torch.where(behind > 0, lacking / behind, 0.0))[:, 1:]
    kept = (noise.uniform(Stream.ACCEPT, length) < h) & exists
    counts = (kept * torch.arange(1, length + 1, device=p.device)).amax(1)
    weights = residual(joint[rows, counts][:, None] * p[rows, counts], q[rows, counts])
    return Acceptance.at(draft, counts, draw(weights, noise.uniform(Stream.NEXT, 1)[:, 0]))
