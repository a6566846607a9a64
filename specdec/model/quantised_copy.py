"""A copy of a model that computes with rounded weights and shares everything else with it."""

import re
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from attention.hf.latent import latent_heads
from specdec.model.fusion.projections import why_not_plain, with_children
from specdec.model.fusion.quantised.packed import PackedWeight
from specdec.model.fusion.quantised.packed_linear import PackedLinear
from specdec.model.fusion.quantised.readers import layer_mark, read
from specdec.model.fusion.quantised.rounding import round_to_nearest, rounding_misfit
from specdec.model.streaming import streamed_layers

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

INT4_GROUP = 128  # inner positions, of most published checkpoints


class QuantisedCopy:
    """`original` with its linear layers rounded to `bits` (`round_to_nearest`), as `model`.

    Norms, embeddings, biases, buffers, experts, adapters and configurations are the original's own objects, and the
    original stays as it is. `group` inner positions share a scale (None: 128 in 4 bits, all in 8 bits). The output
    layer is rounded only with `output_layer`. `kept` says of the layers with matrices that were not rounded why.

    The copy's own memory is that of its packed weights: 4.25 bits a rounded weight in 4 bits and groups of 128, a
    quarter of the original's 16; and 8 bits.

    Raises ValueError for bits or a group that there are not, for a model without a layer that can be rounded, and for
    weights that are not finite, or streamed (`stream_layers`).

    >>> layer = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 8))
    >>> layer.get_output_embeddings = lambda: None  # transformers' models have such a method
    >>> copy = QuantisedCopy(layer)
    >>> print(copy.model[0], copy.model[1] is layer[1], copy.kept)
    PackedLinear(in_features=256, out_features=8, int4 bfloat16) True {'1': 'its 8 inner positions do not divide into \
groups of 128'}
    """

    def __init__(self, original: "PreTrainedModel", bits: int = 4, group: int | None = None,
                 output_layer: bool = False):  # fmt: skip
        rounding_misfit(0, bits, INT4_GROUP if group is None else group)  # raises
        if streamed_layers(original) is not None:
            raise ValueError(f"{type(original).__name__} has streamed layers, of which no rounded copy is made")
        self.original, self.bits = original, bits
        self.kept: dict[str, str] = {}
        self._group, self._head = group, None if output_layer else original.get_output_embeddings()
        self._of_latents = [heads.expand for module in original.modules() if (heads := latent_heads(module))]
        self._rounded: dict[nn.Linear, tuple[PackedLinear, tuple]] = {}
        self._twins: dict[nn.Module, nn.Module] = {}
        self._modules = list(original.modules())
        self.model = self._twin(original, "")
        if not self._rounded:
            why = self.kept_layers() or "it has no linear layer"
            raise ValueError(f"no layer of {type(original).__name__} can be rounded to {bits} bits; {why}")

    @property
    def nbytes(self) -> int:
        """Bytes of its packed weights."""
        return sum(packed.packed.nbytes for packed, _ in self._rounded.values())

    def refresh(self) -> None:
        """Round anew what has been written to since, in place.

        Raises ValueError where modules of the original were added, taken out or exchanged: then make a new copy."""
        if list(map(id, self.original.modules())) != list(map(id, self._modules)):
            raise ValueError(
                f"modules of {type(self.original).__name__} were exchanged since its weights were rounded to "
                f"{self.bits} bits: make a new copy (a new drafter)"
            )
        for layer, (packed, mark) in self._rounded.items():
            if layer_mark(layer) != mark:
                weight = self._round(layer)
                packed.values.copy_(weight.values)
                packed.scales.copy_(weight.scales)
                self._rounded[layer] = packed, layer_mark(layer)

    def kept_layers(self) -> str:
        """A text of a line for each kind of layer that was not rounded; numbers in names are shown as *."""
        kinds = Counter((re.sub(r"\d+", "*", name), why) for name, why in self.kept.items())
        lines = [f"{name} ({count}): {why}" for (name, why), count in kinds.items()]
        return "\n".join([f"not rounded to {self.bits} bits:", *lines]) if lines else ""

    def _twin(self, module: nn.Module, name: str) -> nn.Module:
        if module not in self._twins:
            self._twins[module] = self._make_twin(module, name)
        return self._twins[module]

    def _make_twin(self, module: nn.Module, name: str) -> nn.Module:
        """The copy of a module called `name`; the module itself where nothing below it is rounded."""
        if "_active_adapter" in vars(module):  # PEFT switches its layers on and off
            self.kept[name] = "an adapter's layer is left to its owner"
            return module
        if (reading := read(module)) is not None:
            self.kept[name] = f"it is quantised already ({reading.kind}, {type(module).__name__})"
            return module
        why: str | None = f"it is a {type(module).__name__}, not an nn.Linear"
        if isinstance(module, nn.Linear) and (why := self._why_not(module)) is None:
            packed = PackedLinear(self._round(module), module.bias)
            packed.train(module.training)
            self._rounded[module] = packed, layer_mark(module)
            return packed
        matrices = [p for p in module._parameters.values() if p is not None and p.ndim > 1]
        if why is not None and matrices and not isinstance(module, nn.Embedding):
            self.kept[name] = why
        children = {
            key: None if child is None else self._twin(child, f"{name}.{key}".removeprefix("."))
            for key, child in module._modules.items()
        }
        return with_children(module, children)

    def _why_not(self, layer: nn.Linear) -> str | None:
        if layer is self._head:
            return "it is the output layer, which is rounded with output_layer=True"
        if any(layer is one for one in self._of_latents):
            return "attention over latents multiplies queries and outputs by its weight"
        if (why := why_not_plain(layer)) is not None:
            return why
        return rounding_misfit(layer.in_features, self.bits, self._group_of(layer))

    def _group_of(self, layer: nn.Linear) -> int:
        return self._group or (INT4_GROUP if self.bits == 4 else layer.in_features)

    @torch.inference_mode(False)
    def _round(self, layer: nn.Linear) -> PackedWeight:
        return round_to_nearest(layer.weight.detach(), self.bits, self._group_of(layer))
