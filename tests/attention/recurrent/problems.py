"""Random problems for each update rule, and what a loop over single tokens makes of them."""

import torch
from torch import Tensor

from attention.recurrent.rules import RULES

# a spine of depth 6 with branches along it: late nodes sit at early depths
PARENTS = (None, 0, 0, 1, 1, 2, 3, 6, 7, 8, 4, 10, 0)
KINDS = [*RULES, "delta rule by channel"]


def sees(parents=PARENTS) -> Tensor:
    """`[M, M]` bool: the ancestors of each node and itself."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent is not None:
            seen[node] |= seen[parent]
    return seen


def problem(kind: str, tokens: int, rows: int = 2, seed: int = 0) -> tuple[str, Tensor, tuple, tuple, tuple]:
    """The rule's name, a state, and inputs, reads and constants of `tokens` tokens of each row."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)
    if kind == "convolution":
        return kind, rand(rows, 6, 3), (rand(rows, tokens, 6),), (), (rand(6, 4), rand(6))
    if kind == "selective scan":
        dt, x, b, c = rand(rows, tokens, 5).exp(), rand(rows, tokens, 5), rand(rows, tokens, 4), rand(rows, tokens, 4)
        return kind, rand(rows, 5, 4), (dt, dt * x, b), (c,), (-rand(1, 5, 4).exp(),)
    key, value, other = rand(rows, tokens, 2, 3) / 2, rand(rows, tokens, 4, 5), rand(rows, tokens, 2, 3)
    decay = -rand(rows, tokens, 4, 3 if kind.endswith("by channel") else 1).exp() / 4
    if kind == "state space":
        return kind, rand(rows, 4, 3, 5), (key, value, decay), (other,), ()
    return "delta rule", rand(rows, 4, 3, 5), (key, value, decay, rand(rows, tokens, 4).sigmoid()), (other,), ()


def step(kind: str, state: Tensor, inputs: tuple, reads: tuple, constants: tuple) -> tuple[Tensor, Tensor]:
    """One token of one row: `state [*]` after it, and its output, by the formulas of the rules' modules."""
    if kind == "convolution":
        window = torch.cat([state, inputs[0][:, None]], 1)
        return window[:, 1:], (window * constants[0]).sum(1) + constants[1]
    if kind == "selective scan":
        dt, x, b = inputs
        state = (dt[:, None] * constants[0][0]).exp() * state + x[:, None] * b
        return state, state @ reads[0]
    wide = lambda x: x.repeat_interleave(len(state) // len(x), 0)
    if kind == "state space":
        b, x, g = inputs
        state = g.exp()[..., None] * state + wide(b)[..., None] * x[:, None]
    else:
        k, v, g, beta = inputs
        state, k = g.exp()[..., None] * state, wide(k)
        state = state + k[..., None] * (beta[:, None] * (v - torch.einsum("hkv,hk->hv", state, k)))[:, None]
    return state, torch.einsum("hkv,hk->hv", state, wide(reads[0]))


def by_tokens(kind: str, state: Tensor, inputs: tuple, reads: tuple, constants: tuple,
              parents=None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs `[B, M, *]` and states `[B, M, *]` after each token, one after the other; None: a chain."""
    count = inputs[0].shape[1]
    parents = [None, *range(count - 1)] if parents is None else parents
    outputs, states = [], []
    for row in range(len(state)):
        after, out = [], []
        for token, parent in enumerate(parents):
            before = state[row] if parent is None else after[parent]
            given = tuple(x[row, token] for x in inputs), tuple(x[row, token] for x in reads)
            one, result = step(kind, before, *given, constants)
            after.append(one)
            out.append(result)
        states.append(torch.stack(after))
        outputs.append(torch.stack(out))
    return torch.stack(outputs), torch.stack(states)
