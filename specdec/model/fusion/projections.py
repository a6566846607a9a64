"""Projections that read the same input, joined into one matrix product: q, k and v, gate and up.

A GPU reads one large matrix faster than three small ones, and launches once. The values are those of the separate
products up to rounding."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from specdec.model.fusion.notes import Note

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)  # as most architectures of transformers call them, in the order they are asked


def fuse_projections(
    model: nn.Module, product: Callable = nn.functional.linear, notes: list[Note] | None = None, move: bool = True
) -> nn.Module:
    """A twin of `model` with joined projections, or `model` itself where there is nothing to do.

    `product(x, weight, bias)` is what joined and all other ordinary `nn.Linear` multiply with. What becomes of each is
    appended to `notes`. Without `move` no weight is moved, and joined projections multiply one after the other: a
    rehearsal.

    The twin shares all weights: those of joined layers are moved, once, to lie behind each other in memory, and `model`
    itself goes on with views of them, so nothing is held twice. Whoever reads them elsewhere by address has to look
    again. Layers that are more than an `nn.Linear` (quantised, with adapters, with hooks) are left alone. A module with
    a method `fuse_projections(product)` makes its twin itself.

    >>> layer = nn.ModuleDict({name: nn.Linear(4, 6, bias=False) for name in ("gate_proj", "up_proj")})
    >>> twin, x = fuse_projections(layer), torch.ones(2, 4)
    >>> bool(torch.allclose(twin["gate_proj"](x) * twin["up_proj"](x), layer["gate_proj"](x) * layer["up_proj"](x)))
    True
    """
    notes = [] if notes is None else notes
    if "_active_adapter" in vars(model):  # an adapter's layer, which its owner switches on and off
        notes.append(Note("product", type(model).__name__, "an adapter's layer is left to its owner"))
        return model
    if hasattr(model, "fuse_projections"):  # it knows for itself
        return model.fuse_projections(product)
    if product is not nn.functional.linear and isinstance(model, nn.Linear):
        why = _why_not_plain(model)
        notes.append(Note("product", type(model).__name__, why))
        if why is None:
            twin = shallow_copy(model)
            twin.__class__, twin.product = (
                OwnProduct,
                product,
            )  # a class, so that a compiler sees one layer like the other
            return twin
    children = {
        name: None if child is None else fuse_projections(child, product, notes, move)
        for name, child in model._modules.items()
    }
    for names in GROUPS:
        layers = [model._modules.get(name) for name in names]
        if None in layers:
            continue
        why = _why_not_joined(layers)
        notes.append(Note(f"product {'+'.join(names)}", type(model).__name__, why))
        if why is None:
            first = FusedProjections(layers, product, move)
            children |= dict(
                zip(names, [first, *(FusedSlice(first, index) for index in range(len(names) - 1))], strict=True)
            )
    if all(children[name] is child for name, child in model._modules.items()):
        return model
    twin = shallow_copy(model)
    twin._modules = children
    return twin


def join(layers: Sequence[nn.Module | None], product: Callable) -> "FusedProjections | None":
    """Layers that read the same input as one; None where some of them are no ordinary `nn.Linear`, or they are of
    different kinds.
    """
    return None if _why_not_joined(layers) else FusedProjections(layers, product)


def _why_not_joined(layers: Sequence[nn.Module | None]) -> str | None:
    """What keeps layers that read the same input from being one product, or None."""
    why = next((why for why in map(_why_not_plain, layers) if why), None)
    return why or (None if len({_kind(layer) for layer in layers}) == 1 else "they differ in dtype, device or bias")


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the same parameters and children, whose children can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


class FusedProjections(nn.Module):
    """The first of several projections: it multiplies by all their matrices and keeps what the others are about to be
    asked for.
    """

    def __init__(self, layers: Sequence[nn.Linear], product: Callable = nn.functional.linear, move: bool = True):
        super().__init__()
        self.product = product
        self.layers = tuple(layers)  # a tuple, so that their parameters are not counted as this module's
        self.sizes = [layer.out_features for layer in layers]
        self.fused = _in_a_row([layer.weight for layer in layers]) if move else None
        self.bias = _in_a_row([layer.bias for layer in layers]) if move and layers[0].bias is not None else None
        self.source: Tensor | None = None
        self.shares: tuple[Tensor, ...] = ()

    @property
    def weight(self) -> Tensor:
        """The matrix of this projection alone."""
        return self.layers[0].weight

    def multiply(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., sum of out]`, of all projections."""
        if self.fused is None:
            return torch.cat([self.product(x, layer.weight, layer.bias) for layer in self.layers], -1)
        return self.product(x, self.fused, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]` of the first projection."""
        first, *self.shares = self.multiply(x).split(self.sizes, -1)
        self.source = x
        return first


class OwnProduct(nn.Linear):
    """A linear layer with a product of its own."""

    product: Callable

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self.product(x, self.weight, self.bias)


class FusedSlice(nn.Module):
    """One of the others: what has been computed for the same input, else its own product."""

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
        share = first.shares[self.index]
        if self.index + 2 == len(first.sizes):  # nobody else will ask
            first.source, first.shares = None, ()
        return share


def changed(module: nn.Module) -> bool:
    """Whether somebody has given this very module something of its own to do."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _why_not_plain(layer: nn.Module | None) -> str | None:
    """What a layer does besides multiplying by its own ordinary weights, or None."""
    if type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, not an nn.Linear"
    if changed(layer):
        return "it has hooks, or a forward of its own"
    if not all(p is None or type(p) is nn.Parameter and type(p.data) is Tensor for p in (layer.weight, layer.bias)):
        return f"its weight is a {type(layer.weight.data).__name__} (quantised, or spread over devices)"
    return None


def _kind(layer: nn.Linear) -> tuple:
    return layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None


@torch.no_grad()
def _in_a_row(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The parameters as one tensor `[sum of rows, ...]`, of which they are views from now on."""
    first, row = parameters[0], parameters[0].stride(0)
    offsets = [p.storage_offset() - first.storage_offset() for p in parameters]
    rows = [sum(len(p) for p in parameters[:index]) for index in range(len(parameters) + 1)]
    together = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parameters)
    if together and offsets == [row * n for n in rows[:-1]]:  # joined before
        return first.detach().as_strided((rows[-1], *first.shape[1:]), first.stride())
    with torch.inference_mode(False):
        fused = torch.cat([p.detach() for p in parameters])
        for parameter, start, stop in zip(parameters, rows, rows[1:], strict=False):
            parameter.data = fused[start:stop]
    return fused
