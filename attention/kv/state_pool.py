"""The memory of recurrent states: what a pool of them holds, and how much one sequence's state takes."""

import torch
from torch import Tensor

from attention.kv.layout import RecurrentLayer
from attention.recurrent.nodes import replay_nodes
from attention.recurrent.rules import RULES

ROLLBACK = 8  # tokens


class StatePool:
    """The states of the layers of one kind on one device.

    states: `[layers, cells + 1, *state]`, after the checkpoint; the last cell is for what belongs to no sequence.
    inputs: `[layers, cells + 1, room, *input]` each, of the tokens since then.
    constants: `[layers, *constant]` each: what the last forward computed with.
    """

    def __init__(self, layer: RecurrentLayer, layers: int, cells: int, room: int, dtype: torch.dtype,
                 device: torch.device):  # fmt: skip
        self.layer, self.rule, self.device = layer, RULES[layer.kind], device
        self.dtype = dtype if layer.keeps_dtype else torch.float32
        make = lambda *shape: torch.zeros(*shape, dtype=self.dtype, device=device)
        with torch.inference_mode(False):  # they outlive the call that makes them
            self.states = make(layers, cells + 1, *layer.state)
            self.inputs = tuple(make(layers, cells + 1, room, *shape) for shape in layer.inputs)
            self.constants = tuple(make(layers, *shape) for shape in layer.constants)

    def resize(self, cells: int, room: int) -> None:
        """Hold more cells, or more tokens in each."""
        old = self.states, self.inputs
        with torch.inference_mode(False):
            self.states = old[0].new_zeros(len(old[0]), cells + 1, *self.layer.state)
            self.inputs = tuple(x.new_zeros(len(x), cells + 1, room, *x.shape[3:]) for x in old[1])
            self.states[:, : old[0].shape[1]] = old[0]
            for mine, before in zip(self.inputs, old[1], strict=True):
                mine[:, : before.shape[1], : before.shape[2]] = before

    def replay(self, cells: Tensor, places: Tensor, counts: Tensor) -> None:
        """Run the first `counts [B]` of the kept tokens `places [B, M]` of `cells [B]` from their checkpoints on."""
        replay_nodes(self.layer.kind, self.states, self.inputs, cells, places, counts, self.constants)


def room_for(rollback: int) -> int:
    """Tokens for which there is room after a checkpoint: twice those that are kept at least, and those of a draft.

    The checkpoint moves on when there are more than twice as many; a draft of the first layers alone moves none."""
    return 3 * max(rollback, ROLLBACK)


def bytes_of(layer: RecurrentLayer, dtype: torch.dtype, rollback: int) -> int:
    """Bytes that one sequence's state of `layer` takes, with the tokens after its checkpoint.

    >>> bytes_of(RecurrentLayer("delta rule", (2, 4, 4), ((2, 4), (2, 4), (2, 1), (2,))), torch.bfloat16, rollback=8)
    2048
    """
    numbers = layer.state_numbers + room_for(rollback) * layer.token_numbers
    return numbers * (dtype if layer.keeps_dtype else torch.float32).itemsize
