"""Launches of the kernels of recurrent layers, at the shapes of published models, for `scripts.kernel_resources`."""

from collections.abc import Callable
from itertools import product

import torch


def _tree(kind: str, nodes: int, rows: int) -> None:
    from attention.recurrent import convolution_kernel, linear_kernel

    cells, sees = torch.arange(rows), torch.ones(1, nodes, nodes, dtype=torch.uint8)
    if kind == "convolution":
        x, states = torch.empty(rows, nodes, 10240, dtype=torch.bfloat16), torch.empty(rows, 10240, 3).bfloat16()
        convolution_kernel.launch_tree(states, cells, x, states.new_empty(10240, 4), None, sees, x)
        return
    heads, groups, dk, dv = (128, 8, 128, 64) if kind == "state space" else (48, 16, 128, 128)
    key, gates = torch.empty(rows, nodes, groups, dk), torch.empty(rows, nodes, heads, dk if "channel" in kind else 1)
    inputs = key, torch.empty(rows, nodes, heads, dv), gates
    inputs = inputs if kind == "state space" else (*inputs, torch.empty(rows, nodes, heads))
    linear_kernel.launch_tree(torch.empty(rows, heads, dk, dv), cells, inputs, key, sees, inputs)


def _replay(kind: str) -> None:
    from attention.recurrent import convolution_kernel, linear_kernel

    cells, places = torch.arange(2), torch.zeros(2, 6, dtype=torch.int64)
    if kind == "convolution":
        kept = torch.empty(3, 2, 64, 10240, dtype=torch.bfloat16)
        convolution_kernel.launch_replay(kept.new_empty(3, 2, 10240, 3), kept, cells, places, cells)
        return
    tokens = lambda *shape: torch.empty(3, 2, 64, *shape)
    kept = tokens(16, 128), tokens(48, 128), tokens(48, 128 if "channel" in kind else 1)
    kept = kept if kind == "state space" else (*kept, tokens(48))
    linear_kernel.launch_replay(torch.empty(3, 2, 48, 128, 128), kept, cells, places, cells)


def recurrent_launches() -> dict[str, Callable[[], object]]:
    """Label -> a launch: chains and trees of one and of eight rows, and replays."""
    kinds = ("delta rule", "delta rule by channel", "state space", "convolution")
    launches: dict[str, Callable[[], object]] = {
        f"{kind}, {nodes} nodes, {rows} rows": lambda k=kind, n=nodes, r=rows: _tree(k, n, r)
        for kind, nodes, rows in product(kinds, (6, 64), (1, 8))
    }
    return launches | {f"{kind}, replay": lambda k=kind: _replay(k) for kind in kinds}
