"""Projections of the same input, fused into one matrix product: q, k and v, or gate and up.

A GPU reads one large matrix faster than three small ones, and launches one kernel. Results equal those of the separate
products up to rounding."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from attention.hf.twin import rebound
from specdec.model.fusion.notes import Note
from specdec.model.fusion.quantised.packed import PackedWeight
from specdec.model.fusion.quantised.readers import DIFFERENT, NO_KERNEL, PackedWeights, read
from specdec.model.fusion.quantised.reading import Reading
from specdec.model.fusion.skinny_linear import skinny_linear, skinny_linears
from specdec.model.fusion.weight_layout import ColumnCopies, adjacent

M = TypeVar("M", bound=nn.Module)
# names in most architectures of transformers, in the order in which a forward calls the layers
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse_projections(
    model: M,
    product: Callable = nn.functional.linear,
    notes: list[Note] | None = None,
    move: bool = True,
    copies: ColumnCopies | None = None,
    packed: PackedWeights | None = None,
) -> M:
    """A twin of `model` with fused projections; `model` itself where there is nothing to fuse.

    product: `product(x, weight, bias)` computes fused projections and all other plain `nn.Linear`.
    notes: gets an entry for each layer, fused or not.
    move: without it no weight is moved, and fused projections are computed one after the other.
    copies: makes copies to multiply with, where these are read faster; such weights are not moved.
    packed: collects what is made of weights in 8 or 4 bits (`specdec.model.fusion.quantised`), for a `product` that
        takes them; without it their own modules run them.

    Twin and model share all weights. Those of fused layers are moved once, to lie behind each other in memory, and
    `model` keeps views of them, so nothing is stored twice; code that cached their data pointers must refresh them.
    Layers that are more than an `nn.Linear` (with adapters, with hooks, in other formats) stay as they are. A module
    with a method `fuse_projections(product)` makes its twin itself.

    >>> layer = nn.ModuleDict({name: nn.Linear(4, 6, bias=False) for name in ("gate_proj", "up_proj")})
    >>> twin, x = fuse_projections(layer), torch.ones(2, 4)
    >>> bool(torch.allclose(twin["gate_proj"](x) * twin["up_proj"](x), layer["gate_proj"](x) * layer["up_proj"](x)))
    True
    """
    notes = [] if notes is None else notes
    if "_active_adapter" in vars(model):  # PEFT switches its layers on and off
        notes.append(Note("product", type(model).__name__, "an adapter's layer is left to its owner"))
        return model
    own_method = getattr(model, "fuse_projections", None)
    if callable(own_method):
        return own_method(product)
    if product is not nn.functional.linear and (reading := read(model)) is not None:
        weight, why = _pack([model], [reading], packed)
        notes.append(Note("product", f"{type(model).__name__} ({reading.kind})", why))
        return model if weight is None else cast(M, _with_product(model, product, weight))
    if product is not nn.functional.linear and isinstance(model, nn.Linear):
        why = why_not_plain(model)
        notes.append(Note("product", type(model).__name__, why))
        if why is None:
            return cast(M, _with_product(model, product, None if copies is None else copies.of([model.weight])))
    fused: dict[str, nn.Module] = {}
    for names in GROUPS:
        layers: Sequence[nn.Module] = [layer for name in names if (layer := model._modules.get(name)) is not None]
        if len(layers) < len(names):
            continue
        readings = [reading for layer in layers if (reading := read(layer)) is not None]
        weight = None
        if len(readings) == len(layers):
            weight, why = _pack(layers, readings, packed)
        else:
            layers, why = _fusable(layers)
        notes.append(Note(f"product {'+'.join(names)}", type(model).__name__, why))
        if why is None and (weight is not None or not readings):
            first = FusedProjections(layers, product, move, copies, weight)
            slices = [FusedSlice(first, index) for index in range(len(names) - 1)]
            fused |= dict(zip(names, [first, *slices], strict=True))
    children = {
        name: None
        if child is None
        else fused.get(name) or fuse_projections(child, product, notes, move, copies, packed)
        for name, child in model._modules.items()
    }
    return with_children(model, children)


def join(layers: Sequence[nn.Module | None], product: Callable) -> "FusedProjections | None":
    """Layers of the same input as one; None unless all are plain `nn.Linear` of one dtype, device and kind of bias."""
    linears, why = _fusable(layers)
    return FusedProjections(linears, product) if why is None else None


def _fusable(layers: Sequence[nn.Module | None]) -> tuple[list[nn.Linear], str | None]:
    """The layers, and why they cannot be fused (None: they can)."""
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    why = next((why for why in map(why_not_plain, layers) if why), None)
    if why is None and len({_kind(layer) for layer in linears}) != 1:
        why = "they differ in dtype, device or bias"
    return linears, why


def shallow_copy(module: M) -> M:
    """A module with the same parameters and children, whose children can be replaced."""
    twin = copy.copy(module)
    vars(twin).update({name: rebound(value, module, twin) for name, value in vars(module).items()})
    twin._modules = dict(module._modules)
    return twin


def with_children(module: M, children: dict[str, nn.Module | None]) -> M:
    """`module` with these children: itself if they are its own, else a shallow copy."""
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    twin = shallow_copy(module)
    twin._modules = children
    return twin


class FusedProjections(nn.Module):
    """Several projections as one product, in place of the first; a `FusedSlice` each is in place of the others.

    The forward computes all projections and keeps the others' results for their slices."""

    def __init__(self, layers: Sequence[Any], product: Callable = nn.functional.linear, move: bool = True,
                 copies: ColumnCopies | None = None, packed: PackedWeight | None = None):  # fmt: skip
        super().__init__()
        self.product = product
        # a tuple, so that their parameters are not counted as this module's
        self.layers: tuple[Any, ...] = tuple(layers)
        self.sizes: list[int] = [layer.out_features for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.fused: Tensor | PackedWeight | None = packed
        if packed is None:
            weights = [layer.weight for layer in layers]
            self.fused = None if copies is None else copies.of(weights)
            if self.fused is None and move:
                self.fused = adjacent(weights)
        self.bias = adjacent(biases) if move and biases else None
        self.source: Tensor | None = None
        self.slices: Sequence[Tensor] = ()

    @property
    def weight(self) -> Tensor:
        """The matrix of the first projection alone."""
        return self.layers[0].weight

    def multiply(self, x: Tensor, count: int | None = None) -> Tensor:
        """`[..., in]` -> `[..., sum of out]`, of the first `count` projections (None: of all)."""
        if self.fused is None:
            return _side_by_side(self.product, x, self.layers[:count])
        if count is None or count == len(self.layers):
            return self.product(x, self.fused, self.bias)
        rows = slice(sum(self.sizes[:count]))
        return self.product(x, self.fused[rows], None if self.bias is None else self.bias[rows])

    def multiply_last(self, x: Tensor, count: int) -> Sequence[Tensor] | None:
        """`[..., out]` of each of the last `count` projections; None where one product cannot give them."""
        if not isinstance(self.fused, Tensor):
            return None
        sizes = self.sizes[-count:]
        bias = None if self.bias is None else self.bias[-sum(sizes) :]
        return self.product(x, self.fused[-sum(sizes) :], bias).split(sizes, -1)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]` of the first projection."""
        first, *self.slices = self.multiply(x).split(self.sizes, -1)
        self.source = x
        return first


def _side_by_side(product: Callable, x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    if product is skinny_linear:
        return skinny_linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
    return torch.cat([product(x, layer.weight, layer.bias) for layer in layers], -1)


class OwnProduct(nn.Linear):
    """A linear layer that multiplies by `product(x, weight, bias)`; by a `copy` or packed weight if there is one."""

    product: Callable
    copy: Tensor | PackedWeight | None

    @property
    def matrix(self) -> Tensor | PackedWeight:
        """What it multiplies by."""
        return self.weight if self.copy is None else self.copy

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self.product(x, self.matrix, self.bias)


class FusedSlice(nn.Module):
    """A further projection of `FusedProjections`: returns its result for the same input, else computes its own."""

    def __init__(self, first: FusedProjections, index: int):
        super().__init__()
        self.first, self.index = (first,), index  # a tuple, so that it is no child

    @property
    def weight(self) -> Tensor:
        """The matrix of this projection alone."""
        return self.first[0].layers[self.index + 1].weight

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        (first,) = self.first
        if first.source is not x:
            return first.layers[self.index + 1](x)
        result = first.slices[self.index]
        if self.index + 2 == len(first.sizes):  # the last slice: free the results
            first.source, first.slices = None, ()
        return result


def project(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """`x [..., in]` through each of `layers`, `[..., out]`, of which a fused group's last ones take one product.

    For rows that the group's first projections are not asked for."""
    group = [layer for layer in layers if isinstance(layer, FusedSlice)]
    if len(group) == len(layers) and len({id(layer.first[0]) for layer in group}) == 1:
        (first,), last = group[0].first, len(group[0].first[0].sizes) - 1
        if [layer.index + 1 for layer in group] == list(range(last + 1 - len(group), last + 1)):
            products = first.multiply_last(x, len(group))
            if products is not None:
                return products
    return [layer(x) for layer in layers]


def _with_product(layer: nn.Module, product: Callable, copy: Tensor | PackedWeight | None) -> nn.Module:
    """A twin of another class, not with another `forward`: a compiler then treats all such layers alike."""
    twin = shallow_copy(layer)
    twin.__class__, vars(twin)["product"], vars(twin)["copy"] = OwnProduct, product, copy
    vars(twin).pop("forward", None)
    return twin


def changed(module: nn.Module) -> bool:
    """Whether this very module has hooks or a `forward` of its own."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def why_not_plain(layer: nn.Module | None) -> str | None:
    """Why a layer does more than multiply by ordinary weights of its own; None if it does not."""
    if layer is None or type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, not an nn.Linear"
    if changed(layer):
        return "it has hooks, or a forward of its own"
    if not all(p is None or type(p) is nn.Parameter and type(p.data) is Tensor for p in (layer.weight, layer.bias)):
        return f"its weight is a {type(layer.weight.data).__name__} (quantised, or spread over devices)"
    return None


def _pack(layers: Sequence[nn.Module], readings: Sequence[Reading], packed: PackedWeights | None):
    """The layers' packed weight and None, or None and why there is none (None too in a rehearsal for a GPU)."""
    if (why := next((reading.why for reading in readings if reading.why), None)) is not None:
        return None, why
    if len({layer.bias is None for layer in layers}) > 1:
        return None, "they differ in bias"
    if packed is None:
        held = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
        return None, NO_KERNEL if any(t.device.type == "cpu" for t in held) else None
    weight = packed.of(layers, readings)
    return weight, DIFFERENT if weight is None else None


def _kind(layer: nn.Linear) -> tuple:
    return layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None
