"""Hidden states between a model's decoder blocks, by transformers' index, without a hook or change in the model.

Index 0 are the embeddings, i the output of block i (counted from 1), which is the input of the next; the last one, the
number of blocks, is the input of the output layer, after the final norm; "last_block" is what the final norm reads,
which transformers does not number. Modules of a twin are replaced by copies that
store their input in the twin's `CallSlot`."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from attention.hf.probe import UnsupportedArchitecture
from attention.hf.twin import CallSlot

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


Layers = Sequence[int] | Literal["output", "last_block"]


def num_blocks(model: "PreTrainedModel") -> int:
    """The number of decoder blocks."""
    return model.config.get_text_config().num_hidden_layers


def hidden_layers(model: "PreTrainedModel", layers: Layers) -> tuple[int, ...]:
    """`layers` as indices, "last_block" as one more than the last. Raises ValueError for one that there is not."""
    last = num_blocks(model)
    if layers == "last_block":
        return (last + 1,)
    indices = (last,) if layers == "output" else tuple(layers)
    for layer in indices:
        if not 0 <= layer <= last:
            raise ValueError(
                f"features of layer {layer} are wanted, but {type(model).__name__} has hidden states 0 (embeddings) to "
                f"{last} (after the last block)"
            )
    return indices


def blocks_name(model: "PreTrainedModel", attending: Sequence[str]) -> str:
    """The name of the list of decoder blocks, whose modules `attending` call attention (none: no module does).

    Raises UnsupportedArchitecture for a model without such a list."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks(model):
            if not attending or any(layer.startswith(f"{name}.") for layer in attending):
                return name
    raise UnsupportedArchitecture(
        f"{type(model).__name__} has no list of {num_blocks(model)} decoder blocks, so the hidden states between them "
        "cannot be read"
    )


def seen(slot: CallSlot, model: "PreTrainedModel") -> tuple[Tensor, dict[int, Tensor]]:
    """What a forward of tapped modules has left in `slot`: the input of the output layer, and those of blocks.

    Raises UnsupportedArchitecture where the output layer was not called."""
    if slot.hidden is None:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} makes logits without calling its output layer, so its hidden states are not seen"
        )
    return slot.hidden, slot.inputs


def joined(hidden: Tensor, inputs: dict[int, Tensor], layers: Sequence[int], blocks: int,
           device: torch.device) -> Tensor:  # fmt: skip
    """The hidden states `[M, sum of widths]` of `layers`, on one device.

    hidden `[M, h]`: of the last of `blocks` blocks, after the final norm.
    inputs: by layer, `[..., h]` of M tokens.
    """
    parts = [(hidden if layer == blocks else inputs[layer].flatten(0, -2)).to(device) for layer in layers]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def tap_output_layer(twin: "PreTrainedModel", slot: CallSlot) -> None:
    """Make the twin's output layer store its input in `slot.hidden`.

    Its parent in the twin gets a copy of the layer; the layer itself, which the model may share, stays as it is."""
    layer = twin.get_output_embeddings()
    places = ((parent, name) for parent in twin.modules() for name, child in parent._modules.items() if child is layer)
    parent, name = next(places, (None, ""))
    if layer is None or parent is None:
        return
    tapped, forward = copy.copy(layer), layer.forward

    def store(hidden: Tensor, *arguments, **keywords) -> Tensor:
        if not torch.compiler.is_compiling():
            slot.hidden = hidden
            hidden = hidden if slot.keep is None else hidden[..., slot.keep.to(hidden.device), :]
        return forward(hidden, *arguments, **keywords)

    tapped.forward = store
    parent._modules = {**parent._modules, name: tapped}


def tap_blocks(twin: nn.Module, name: str, slot: CallSlot) -> None:
    """Make the decoder blocks in the ModuleList `name` of a twin store what is wanted in `slot.inputs`.

    The list gets copies of the blocks; the blocks themselves stay as they are."""
    blocks = twin.get_submodule(name)
    blocks._modules = {
        key: None if block is None else _tapped_block(block, index, len(blocks._modules), slot)
        for index, (key, block) in enumerate(blocks._modules.items())
    }


def _tapped_block(block: nn.Module, index: int, count: int, slot: CallSlot) -> nn.Module:
    def store(*arguments, **keywords):
        if index in slot.wanted:
            slot.inputs[index] = arguments[0] if arguments else keywords["hidden_states"]
        found = block.forward(*arguments, **keywords)
        if index + 1 == count and count + 1 in slot.wanted:  # what the final norm reads
            slot.inputs[count + 1] = found[0] if isinstance(found, tuple) else found
        return found

    tapped = copy.copy(block)
    vars(tapped)["forward"] = store
    return tapped
