"""The gated delta rule: a state `S` becomes `exp(g) S`, then `S + beta k (v - S^T k)^T`, and is read by `q^T S`.

The decay `g` is one number a head (Yang et al. 2025, Gated Delta Networks) or one for each dim of the keys (Kimi Team
2025, Kimi Linear). What each token writes depends on what its ancestors wrote; for all tokens at once that is one
triangular system, whose triangle is the mask of the tree."""

import torch
from torch import Tensor

from attention.recurrent.linear import BLOCK, by_head, decayed_products, folded, read, total_decay

__all__ = ["BLOCK", "fold", "run"]


def run(state: Tensor, inputs: tuple[Tensor, ...], reads: tuple[Tensor, ...], sees: Tensor | None = None,
        constants: tuple[Tensor, ...] = ()) -> Tensor:  # fmt: skip
    """`[B, M, H, Dv]`: outputs of M tokens after `state [B, H, Dk, Dv]`, all in float32.

    inputs: keys `[B, M, G, Dk]`, values `[B, M, H, Dv]`, g `[B, M, H, X]` with X 1 or Dk, and beta `[B, M, H]`
    reads: queries `[B, M, G, Dk]`
    sees: `[B, M, M]` bool, the ancestors of each token and itself, which come before it (None: a chain)
    """
    keys, values, total = _written(state, inputs, sees)
    return read(state, by_head(reads[0], state.shape[1]), keys, values, total, sees)


def fold(state: Tensor, inputs: tuple[Tensor, ...], counts: Tensor, constants: tuple[Tensor, ...] = ()) -> Tensor:
    """`state` after a chain of M tokens. Tokens after the first `counts [B]` are zeros, which change nothing."""
    return folded(state, *_written(state, inputs, None))


def _written(state: Tensor, inputs: tuple[Tensor, ...], sees: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, what each token adds along them, and the decay down to each token."""
    keys, values, g, beta = inputs
    keys, values, beta = by_head(keys, state.shape[1]), values.transpose(1, 2), beta.transpose(1, 2)[..., None]
    total = total_decay(g, sees)
    system = (beta * decayed_products(keys, keys, total, sees)).tril(-1)
    wanted = beta * (values - (keys * total.exp()) @ state)
    return keys, torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True), total
