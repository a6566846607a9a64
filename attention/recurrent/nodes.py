"""What a recurrent layer does with the nodes of trees: read them without changing a state, and replay a path of them.

A state is addressed by its cell, so that what a CUDA graph was captured with stays where it is. Nothing here reads a
tensor on the host; the shapes are those of the tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.recurrent.rules import RULES

MAX_NODES = 64  # of one row, for the kernels: a tile of nodes by nodes is held in registers
KERNELS = ("convolution", "delta rule", "state space")


def run_nodes(kind: str, states: Tensor, cells: Tensor, inputs: tuple[Tensor, ...], reads: tuple[Tensor, ...],
              sees: Tensor | None, constants: tuple[Tensor, ...], kept: tuple[Tensor, ...] | None = None,
              impl: str | None = None) -> Tensor:  # fmt: skip
    """`[B, M, *]`: outputs of M nodes of each row, which begin with `states [cells, *]` at `cells [B]`.

    kind, inputs, reads, constants: a rule and what it takes (`attention.recurrent.rules`), `[B, M, *]` each
    sees: bool `[B, M, M]`, or `[1, M, M]` for all rows; the ancestors of each node and itself (None: chains)
    kept: `[cells, room, *]` each, where the inputs are written to (None: nowhere)

    Raises ValueError for an `impl` that cannot run."""
    if resolve(impl, states.device, lambda: _obstacle(kind, inputs[0].shape[1])) == "reference":
        if sees is not None:
            sees = sees.expand(len(cells), -1, -1)
        out = RULES[kind].run(states[cells], inputs, reads, sees, constants)
        place = torch.arange(inputs[0].shape[1], device=cells.device)
        for mine, given in zip(kept or (), inputs, strict=False):
            mine[cells[:, None], place] = given.to(mine.dtype)
        return out
    bits = None if sees is None else sees.contiguous().view(torch.uint8)
    if kind == "convolution":
        from attention.recurrent import convolution_kernel

        weight, bias = constants[0].contiguous(), constants[1] if len(constants) > 1 else None
        to = None if kept is None else kept[0]
        return convolution_kernel.launch_tree(states, cells, inputs[0], weight, bias, bits, to)
    from attention.recurrent import linear_kernel

    inputs, queries = tuple(map(_with_contiguous_tokens, inputs)), _with_contiguous_tokens(reads[0])
    return linear_kernel.launch_tree(states, cells, inputs, queries, bits, kept)


def replay_nodes(kind: str, states: Tensor, kept: tuple[Tensor, ...], cells: Tensor, places: Tensor, counts: Tensor,
                 constants: tuple[Tensor, ...], impl: str | None = None) -> None:  # fmt: skip
    """Run kept tokens from `states [layers, cells, *]` at `cells [B]` on, in place.

    kept: `[layers, cells, room, *]` each; places: `[B, E]`, of which the first `counts [B]` are run
    constants: `[layers, *]` each

    No two rows with tokens may have the same cell."""
    if resolve(impl, states.device, lambda: _obstacle(kind, 1)) == "reference":
        return _replay_reference(kind, states, kept, cells, places, counts, constants)
    places, counts = places.contiguous(), counts.contiguous()
    launch: Callable[..., None]
    if kind == "convolution":
        from attention.recurrent.convolution_kernel import launch_replay as launch

        return launch(states, kept[0], cells, places, counts)
    from attention.recurrent.linear_kernel import launch_replay as launch

    return launch(states, kept, cells, places, counts)


def _replay_reference(kind: str, states: Tensor, kept: tuple[Tensor, ...], cells: Tensor, places: Tensor,
                      counts: Tensor, constants: tuple[Tensor, ...]) -> None:  # fmt: skip
    layers, rows, rule = len(states), len(cells), RULES[kind]
    state, counts = states[:, cells].flatten(0, 1), counts.repeat(layers)
    constants = tuple(x.repeat_interleave(rows, 0) for x in constants)
    for start in range(0, places.shape[1], rule.block):
        some = places[:, start : start + rule.block]
        left = (counts - start).clamp(0, some.shape[1])
        absent = torch.arange(some.shape[1], device=cells.device) >= left[:, None]
        given = [x[:, cells[:, None], some].flatten(0, 1) for x in kept]
        given = [x.masked_fill(absent.view(*absent.shape, *[1] * (x.ndim - 2)), 0) for x in given]
        state = rule.fold(state, tuple(given), left, constants)
    states[:, cells] = state.unflatten(0, (layers, rows))


def _obstacle(kind: str, nodes: int) -> str | None:
    """Why the kernels cannot run this many nodes of a layer of that kind; None: they can."""
    if kind not in KERNELS:
        return f"there is none for layers of the kind {kind!r}"
    return None if nodes <= MAX_NODES else f"it takes up to {MAX_NODES} nodes of a row, got {nodes}"


def _with_contiguous_tokens(x: Tensor) -> Tensor:
    """`x [B, M, *]` with the numbers of each token side by side."""
    rest = x[0, 0] if x.numel() else x
    return x if rest.is_contiguous() else x.contiguous()
