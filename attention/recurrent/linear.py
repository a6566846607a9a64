"""Linear attention over a state, with a decay: what Mamba-2, the gated delta rule and Kimi's delta attention share.

A state `S [Dk, Dv]` of a head becomes `exp(g) S + k u^T` with each token, and is read by `q^T S`. Of M tokens at once,
each of which sees its ancestors and itself, all outputs follow from products of matrices (Dao and Gu 2024, Mamba-2,
section 6, with the mask of a tree in place of a triangle)."""

import torch
from torch import Tensor

BLOCK = 64  # tokens of a chain that run at once: products of M x M matrices pay up to about there


def by_head(x: Tensor, heads: int) -> Tensor:
    """`x [B, M, G, D]` of G groups of heads as `[B, heads, M, D]`."""
    return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2)


def total_decay(g: Tensor, sees: Tensor | None) -> Tensor:
    """`[B, H, M, X]`: the sum of `g [B, M, H, X]` over a token's ancestors and itself; X is 1 or Dk.

    sees: `[B, M, M]` bool, the tokens that each one sees (None: all before it, and itself)."""
    total = g.cumsum(1) if sees is None else torch.einsum("bij,bjhx->bihx", sees.to(g.dtype), g)
    return total.transpose(1, 2)


def decayed_products(a: Tensor, b: Tensor, total: Tensor, sees: Tensor | None) -> Tensor:
    """`[B, H, M, M]`: products of `a` and `b [B, H, M, Dk]`, decayed from token j to token i; 0 where i sees not j."""
    size = a.shape[2]
    if sees is None:
        sees = torch.ones(1, size, size, dtype=torch.bool, device=a.device).tril()
    hidden = ~sees[:, None]
    if total.shape[-1] == 1:
        decay = (total - total.transpose(2, 3)).masked_fill(hidden, float("-inf")).exp()
        return a @ b.transpose(2, 3) * decay
    decay = (total[:, :, :, None] - total[:, :, None]).masked_fill(hidden[..., None], float("-inf")).exp()
    return torch.einsum("bhid,bhjd,bhijd->bhij", a, b, decay)


def read(state: Tensor, queries: Tensor, keys: Tensor, values: Tensor, total: Tensor, sees: Tensor | None) -> Tensor:
    """`[B, M, H, Dv]`: what `queries [B, H, M, Dk]` read of `state [B, H, Dk, Dv]` and of the tokens that they see.

    keys `[B, H, M, Dk]`, values `[B, H, M, Dv]`: what each token adds to the state; total: see `total_decay`."""
    out = (queries * total.exp()) @ state + decayed_products(queries, keys, total, sees) @ values
    return out.transpose(1, 2)


def folded(state: Tensor, keys: Tensor, values: Tensor, total: Tensor) -> Tensor:
    """`state [B, H, Dk, Dv]` after a chain of M tokens; arguments as in `read`."""
    end = total[:, :, -1:]
    added = (keys * (end - total).exp()).transpose(2, 3) @ values
    return state * end.exp().transpose(2, 3) + added
