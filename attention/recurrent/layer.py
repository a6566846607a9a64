"""One recurrent layer of a forward: new tokens run from the checkpoints of their sequences on."""

import torch
from torch import Tensor

from attention.recurrent.batch import DeviceRecurrentBatch, RecurrentBatch
from attention.recurrent.nodes import run_nodes


def run_recurrent(batch: RecurrentBatch | DeviceRecurrentBatch, layer: int, inputs: tuple[Tensor, ...],
                  reads: tuple[Tensor, ...] = (), constants: tuple[Tensor, ...] = ()) -> Tensor:  # fmt: skip
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
    out, tokens = None, len(inputs[0])
    for block in batch.blocks(rule.block, device):
        some = tuple(block.gather(x, old) for x, old in zip(inputs, kept, strict=True))
        read = tuple(block.gather(x) for x in reads)
        before = state[block.cells]
        out = block.scatter(rule.run(before, some, read, None, of_rule), out, tokens)
        state[block.cells] = rule.fold(before, some, block.counts, of_rule)
    block = batch.open_block(device)
    some = tuple(block.gather(x, old) for x, old in zip(inputs, kept, strict=True))
    read = tuple(block.gather(x) for x in reads)
    values = run_nodes(pool.layer.kind, state, block.cells, some, read, block.sees, of_rule, kept)
    return block.scatter(values, out, tokens)
