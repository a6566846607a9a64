"""All fusions of one model, and a table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from attention.hf.device import device_of
from attention.hf.twin import Twin, make_twin
from specdec.model.decoder_layers import other_parts
from specdec.model.fusion import native
from specdec.model.fusion.compiled_blocks import compile_blocks
from specdec.model.fusion.notes import Note, table, warn_of_lost
from specdec.model.fusion.pointwise import fuse_pointwise
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.quantised.activations import quantises_activations
from specdec.model.fusion.quantised.packed import SIXTEEN_BITS
from specdec.model.fusion.quantised.readers import PackedWeights
from specdec.model.fusion.skinny_linear import skinny_linear
from specdec.model.fusion.weight_layout import ColumnCopies

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

NEAR_TIES = (
    "activations in 8 bits: a sum that is rounded otherwise may become another 8-bit number, so greedy text may part "
    "from transformers', or from that of another mode or number of rows, where two logits nearly tie, as in 16 bits"
)


@dataclass(frozen=True, slots=True)
class FusedModel:
    """A twin's model as forwards run it: with kernels (`eager`) and through torch.compile (`compiled`, or None).

    `output_layer` turns hidden states into logits; `notes` say what is fused; `copies` and `packed` are made of the
    model's weights."""

    eager: "PreTrainedModel"
    compiled: "PreTrainedModel | None"
    output_layer: nn.Module
    notes: list[Note]
    copies: ColumnCopies | None = None
    packed: PackedWeights | None = None

    def current(self) -> bool:
        """Whether all copies of weights are still what the weights are."""
        return all(made is None or made.current() for made in (self.copies, self.packed))


def fuse_model(twin: Twin, layers: Sequence[str], fuse: bool, mode: str) -> FusedModel:
    """Fuse what can be fused if `fuse`, for a mode of `ModelRunner`; `layers` is that of `compile_blocks`.

    Parts that text does not run through, a vision tower say, stay as they are. Warns of layers that are no longer
    recognised."""
    apart = {name: twin.model.get_submodule(name) for name in other_parts(twin.model)} if fuse else {}
    _put(twin.model, dict.fromkeys(apart))
    fused = _fused(twin, layers, fuse, mode)
    for model in (twin.model, fused.eager, fused.compiled):
        if model is not None:
            _put(model, apart)
    return fused


def _put(model: nn.Module, parts: Mapping[str, nn.Module | None]) -> None:
    """Put modules at their names into a twin, whose dictionaries of children may be the original's."""
    for name, part in parts.items():
        parent, _, last = name.rpartition(".")
        outer = model.get_submodule(parent)
        outer._modules = {**outer._modules, last: part}


def _fused(twin: Twin, layers: Sequence[str], fuse: bool, mode: str) -> FusedModel:
    notes: list[Note] = []
    on_cpu = device_of(twin.model).type == "cpu"
    compiled = mode == "compile" and not on_cpu  # recordings of a CPU have kernels in C instead
    own_kernels = on_cpu and mode == "compile" and twin.model.dtype in native.DTYPES
    copies = ColumnCopies(twin.model) if fuse and on_cpu and not own_kernels else None
    packed = PackedWeights() if fuse and not on_cpu and twin.model.dtype in SIXTEEN_BITS else None
    projections = twin.model
    if fuse:
        projections = fuse_projections(twin.model, skinny_linear, notes, not own_kernels, copies, packed)
    eager = fuse_pointwise(projections, notes=notes) if fuse else projections
    warn_of_lost(notes)
    # without pointwise kernels: the compiler fuses these operations itself
    blocks = compile_blocks(projections, layers, twin.slot) if compiled else None
    return FusedModel(eager, blocks, eager.get_output_embeddings(), notes, copies, packed)


def fuse_module(module: nn.Module) -> nn.Module:
    """A twin of a module outside the model (draft heads, say) with the same products and kernels as a fused model.

    Its outputs may be deferred (`deferred_linear.materialise`)."""
    return fuse_pointwise(fuse_projections(module, skinny_linear))


def explain(model: "PreTrainedModel", mode: str, fused: FusedModel | None) -> str:
    """A table of the operations that are fused, per kind of layer, and why others are not.

    Without `fused`, what would be fused in mode "graph"."""
    head = f"{type(model).__name__} on {device_of(model)}, mode {mode!r}"
    tail = f"\n{NEAR_TIES}" if quantises_activations(model) else ""
    if fused is not None:
        return f"{head}\n{table(fused.notes)}{tail}"
    notes: list[Note] = []
    fuse_pointwise(fuse_projections(make_twin(model).model, skinny_linear, notes, move=False), "reference", notes)
    why = "this mode launches operation by operation" if mode == "eager" else "fuse=False"
    return f"{head}: nothing is fused ({why}). With mode='graph':\n{table(notes)}{tail}"
