"""Mamba-1: a state `[I, N]` becomes `exp(dt A) state + (dt x) b^T`, and is read by `state c` (Gu and Dao 2023).

Each number of the state has a decay of its own, so tokens run one after the other."""

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
    """`[B, M, I, N]`: the state after each node, one after the other; a node starts from its parent's state."""
    dt, x, b = inputs
    decay, added = (dt[..., None] * a[:, None]).exp(), x[..., None] * b[:, :, None]
    size = sees.shape[1]
    place = torch.arange(size, device=sees.device)
    others = sees & (place != place[:, None])
    before = torch.where(others, place + 1, 0).amax(2)  # the ancestor that comes last; 0: the state before all
    states = torch.cat([state[:, None], torch.zeros_like(added)], 1)
    at = before[..., None, None].expand(-1, -1, *state.shape[1:])
    for node in range(size):
        parent = states.gather(1, at[:, node : node + 1])[:, 0]
        states[:, node + 1] = decay[:, node] * parent + added[:, node]
    return states[:, 1:]
