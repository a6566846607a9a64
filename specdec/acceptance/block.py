"""Block verification of a chain: drafted tokens are accepted jointly, in expectation no fewer than one by one.

The output is an exact sample. Let P_0 = 1, P_i = min(P_(i-1) p(x_i) / q(x_i), 1) and w_i the mass that q lacks after
x_i, compared with p scaled by P_i:

    w_i = sum_x max(P_i p(x | x_1..i) - q(x | x_1..i), 0)        h_i = w_i / (w_i + 1 - P_i)   for i < γ,   h_γ = P_γ

The longest prefix i with u_i <= h_i is accepted, with an independent uniform u_i for each i. The next token is drawn
from norm(max(P_i p - q, 0)) after i < γ tokens and from p after all. Source: Sun et al. 2024 (Block verification),
Algorithm 2, Theorem 1."""

import torch
from torch import Tensor

from specdec.acceptance.base import Acceptance
from specdec.acceptance.rejection import on_chain, rejection, require_chain
from specdec.sampling.draws import draw, residual
from specdec.sampling.noise import RoundNoise, Stream
from specdec.sampling.warped import Scores, as_unwritten
from specdec.trees.draft import Draft


def block(draft: Draft, scores: Scores, noise: RoundNoise, impl: str | None = None) -> Acceptance:
    """Verify a chain, of which rows may lack the end; see the module's docstring. Raises ValueError for other trees.

    A deterministic draft gains nothing from blocks and is verified by `rejection`."""
    require_chain(draft, "block verification")
    if draft.probs is None:
        return rejection(draft, scores, noise, impl)
    if (unwritten := as_unwritten(scores, impl)) is not None:
        from specdec.acceptance.block_kernel import launch_block

        return launch_block(draft, unwritten, noise)
    assert isinstance(scores, Tensor)
    p = scores.softmax(-1)  # [B, γ + 1, V]
    length, rows = draft.tree.size - 1, torch.arange(p.shape[0], device=p.device)
    p_drafted, q_drafted, exists = on_chain(draft, p)
    # in float64, since p / 1e-45 overflows a float32 and 0 times infinity is NaN
    ratio = torch.where(exists, p_drafted.double() / q_drafted, 0.0)
    products = [torch.ones_like(ratio[:, 0])]  # P_0, …, P_γ
    for i in range(length):
        products.append((products[-1] * ratio[:, i]).clamp(max=1))
    joint = torch.stack(products, 1).to(p.dtype)
    # q is 0 after the last token that a row has: there w = P and h = P, and the next token comes from p
    q = torch.cat([torch.where(exists[..., None], draft.probs, 0.0), torch.zeros_like(p[:, :1])], 1)
    lacking = (joint[..., None] * p - q).clamp(min=0).sum(-1)  # [B, γ + 1]
    last = torch.arange(length + 1, device=p.device) == exists.sum(1, keepdim=True)
    total = lacking + (1 - joint)  # in this order, so that a tiny w is not rounded away at P = 1
    h = torch.where(last, joint, torch.where(total > 0, lacking / total, 0.0))[:, 1:]
    kept = (noise.uniform(Stream.ACCEPT, length) < h) & exists
    counts = (kept * torch.arange(1, length + 1, device=p.device)).amax(1)
    weights = residual(joint[rows, counts][:, None] * p[rows, counts], q[rows, counts])
    return Acceptance.at(draft, counts, draw(weights, noise.uniform(Stream.NEXT, 1)[:, 0]))
