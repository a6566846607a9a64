"""Mamba-2: a state `S [N, P]` of a head becomes `exp(g) S + b x^T`, and is read by `c^T S` (Dao and Gu 2024)."""

from torch import Tensor

from attention.recurrent.linear import BLOCK, by_head, folded, read, total_decay

__all__ = ["BLOCK", "fold", "run"]


def run(state: Tensor, inputs: tuple[Tensor, ...], reads: tuple[Tensor, ...], sees: Tensor | None = None,
        constants: tuple[Tensor, ...] = ()) -> Tensor:  # fmt: skip
    """`[B, M, H, P]`: outputs of M tokens after `state [B, H, N, P]`, all in float32.

    inputs: b `[B, M, G, N]`, x `[B, M, H, P]` times its time step, and g `[B, M, H, 1]`
    reads: c `[B, M, G, N]`
    sees: `[B, M, M]` bool, the ancestors of each token and itself, which come before it (None: a chain)
    """
    b, x, g = inputs
    heads = state.shape[1]
    return read(state, by_head(reads[0], heads), by_head(b, heads), x.transpose(1, 2), total_decay(g, sees), sees)


def fold(state: Tensor, inputs: tuple[Tensor, ...], counts: Tensor, constants: tuple[Tensor, ...] = ()) -> Tensor:
    """`state` after a chain of M tokens. Tokens after the first `counts [B]` are zeros, which change nothing."""
    b, x, g = inputs
    return folded(state, by_head(b, state.shape[1]), x.transpose(1, 2), total_decay(g, None))
