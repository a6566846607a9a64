"""Mamba-1: a state `[I, N]` becomes `exp(dt A) state + (dt x) b^T`, and is read by `state c` (Gu and Dao 2023).

Each number of the state has a decay of its own, so tokens run one after the other, and those of one depth at once."""

import torch
from torch import Tensor

BLOCK = 64  # tokens of a chain whose states are held at once


def run(state: Tensor, inputs: tuple[Tensor, ...], reads: tuple[Tensor, ...], sees: Tensor | None = None,
        constants: tuple[Tensor, ...] = ()) -> Tensor:  # fmt: skip
    """`[B, M, I]`: outputs of M tokens after `state [B, I, N]`, all in float32.

    inputs: dt `[B, M, I]`, dt times x `[B, M, I]`, and b `[B, M, N]`
    reads: c `[B, M, N]`
    constants: A `[B, I, N]`
    sees: `[B, M, M]` bool, the ancestors of each token and itself, which come before it (None: a chain)
    """
    if sees is None:
        states = torch.stack([*_chain(state, inputs, constants[0])], 1)
    else:
        states = _tree(state, inputs, constants[0], sees)
    return torch.einsum("bmin,bmn->bmi", states, reads[0])


def fold(state: Tensor, inputs: tuple[Tensor, ...], counts: Tensor, constants: tuple[Tensor, ...] = ()) -> Tensor:
    """`state` after a chain of M tokens. Tokens after the first `counts [B]` are zeros, which change nothing."""
    for after in _chain(state, inputs, constants[0]):
        state = after
    return state


def _chain(state: Tensor, inputs: tuple[Tensor, ...], a: Tensor):
    dt, x, b = inputs
    for place in range(dt.shape[1]):
        state = (dt[:, place, :, None] * a).exp() * state + x[:, place, :, None] * b[:, place, None]
        yield state


def _tree(state: Tensor, inputs: tuple[Tensor, ...], a: Tensor, sees: Tensor) -> Tensor:
    """`[B, M, I, N]`: the state after each node; a loop over depths, in which a node starts from its parent's state."""
    dt, x, b = inputs
    decay, added = (dt[..., None] * a[:, None]).exp(), x[..., None] * b[:, :, None]
    depth = sees.sum(2)  # 1 for roots
    size = sees.shape[1]
    place = torch.arange(size, device=sees.device)
    others = sees & (place != place[:, None])
    parent = torch.where(others, place, -1).amax(2)  # the ancestor that comes last; -1: the state before all
    states = torch.cat([torch.zeros_like(added), state[:, None]], 1)
    at = parent[..., None, None].remainder(size + 1).expand(-1, -1, *state.shape[1:])
    for level in range(1, int(depth.max()) + 1):
        new = decay * states.gather(1, at) + added
        states[:, :size] = torch.where((depth == level)[..., None, None], new, states[:, :size])
    return states[:, :size]
