"""One recurrent layer of a forward: new tokens run from the checkpoints of their sequences on."""

import torch
from torch import Tensor

from attention.recurrent.batch import RecurrentBatch


def run_recurrent(batch: RecurrentBatch, layer: int, inputs: tuple[Tensor, ...], reads: tuple[Tensor, ...] = (),
                  constants: tuple[Tensor, ...] = ()) -> Tensor:  # fmt: skip
    """Outputs `[T, *]` of the new tokens, which the states of `layer` keep from now on.

    inputs, reads: `[T, *]` each, of the packed new tokens; what they are, and the constants, the layer's rule says.
    """
    number, there = batch.states.places[layer]
    pool = batch.states.pools[number]
    rule, device, state = pool.rule, pool.device, pool.states[there]
    inputs = tuple(x.to(pool.dtype) for x in inputs)
    kept = tuple(x[there] for x in pool.inputs)
    for mine, given in zip(pool.constants, constants, strict=False):
        mine[there] = given
    of_rule = tuple(x[None] for x in constants) if pool.constants else constants
    out: Tensor | None = None

    def write(block, values: Tensor) -> None:
        nonlocal out
        if out is None:
            out = values.new_empty(len(inputs[0]), *values.shape[2:])
        block.scatter(values, out)

    for block in batch.blocks(rule.block, device):
        some = tuple(block.gather(x, old) for x, old in zip(inputs, kept, strict=True))
        read = tuple(block.gather(x) for x in reads)
        before = state[block.cells]
        write(block, rule.run(before, some, read, None, of_rule))
        state[block.cells] = rule.fold(before, some, block.counts, of_rule)
    block = batch.open_block(device)
    some = tuple(block.gather(x, old) for x, old in zip(inputs, kept, strict=True))
    read = tuple(block.gather(x) for x in reads)
    write(block, rule.run(state[block.cells], some, read, block.sees, of_rule))
    room = torch.arange(some[0].shape[1], device=device)
    for mine, given in zip(kept, some, strict=True):
        mine[block.cells[:, None], room] = given
    assert out is not None
    return out
