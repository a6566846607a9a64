"""The table of quantised layers that are known, and the packed weights that were made of one model's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from specdec.model.fusion.quantised.compressed_weights import read_compressed
from specdec.model.fusion.quantised.gptq_weights import read_gptq
from specdec.model.fusion.quantised.packed import PackedWeight, alike
from specdec.model.fusion.quantised.packed_linear import read_packed_linear
from specdec.model.fusion.quantised.reading import Reading
from specdec.model.fusion.quantised.torchao_weights import read_torchao

READERS: tuple[Callable[[nn.Module], Reading | None], ...] = (
    read_packed_linear, read_torchao, read_gptq, read_compressed,
)  # fmt: skip
NO_KERNEL = "kernels are for 16-bit models on a GPU; its own module runs it"
DIFFERENT = (
    "its numbers are not those of its scales, or layers differ in format, width or group; its own module runs it"
)


def read(layer: nn.Module) -> Reading | None:
    """What is to be said of a quantised layer; None for layers of no known kind."""
    return next((reading for reader in READERS if (reading := reader(layer)) is not None), None)


class PackedWeights:
    """The packed weights that were made of one model's layers, and whether these are still what they were.

    int8 and fp8 numbers stay where torchao keeps them, or move once to lie behind each other; of other formats copies
    in the kernels' layout are made, which add their size to the model's memory."""

    def __init__(self):
        self._made: list[tuple[nn.Module, tuple]] = []

    @torch.no_grad()
    def of(self, layers: Sequence[nn.Module], readings: Sequence[Reading]) -> PackedWeight | None:
        """The weights of layers of the same input as one; None where they do not go together."""
        weights = [
            weight for reading in readings if reading.pack is not None and (weight := reading.pack()) is not None
        ]
        if len(weights) < len(layers) or not alike(weights):
            return None
        packed: PackedWeight = weights[0] if len(weights) == 1 else weights[0].join(weights[1:])  # type: ignore[arg-type]
        self._made += [(layer, layer_mark(layer)) for layer in layers]
        return packed

    def current(self) -> bool:
        """Whether all layers still hold what was packed."""
        return all(layer_mark(layer) == mark for layer, mark in self._made)


def layer_mark(layer: nn.Module) -> tuple:
    """Where a layer's numbers lie, and how often they were changed in place (not known of inference tensors)."""
    return tuple(
        (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
        for given in (*layer._parameters.values(), *layer._buffers.values())
        if given is not None
        for tensor in _inner(given)
    )


def _inner(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
