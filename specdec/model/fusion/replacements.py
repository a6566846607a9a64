"""Callables that replace a module's forward, or a function it calls, by a kernel of `pointwise_kernel`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from specdec.model.fusion.deferred_linear import DeferredLinear, materialise
from specdec.model.fusion.product_inputs import Norm
from specdec.model.fusion.projections import FusedProjections


class FusedNorm:
    """An RMS norm, computed with the product before it where that is deferred.

    rms_norms: computes two norms side by side (None: nothing does)."""

    def __init__(self, module: nn.Module, eps: float, offset: bool, rms_norm: Callable,
                 rms_norms: Callable | None = None):  # fmt: skip
        self._module, self._eps, self._offset = module, eps, offset
        self._rms_norm, self._rms_norms = rms_norm, rms_norms

    def __call__(self, x: Tensor, *gates: Tensor | None, **more: Tensor | None) -> Tensor:
        """`[..., width]` -> `[..., width]`; with anything else (a gate), as the module itself computes it."""
        weight = self._module._parameters["weight"]
        if weight is None or x.dtype != weight.dtype or gates or more:
            return self._module(materialise(x), *gates, **more)
        norm = Norm(weight, self._eps, self._offset)
        normed = x.normed(norm) if isinstance(x, DeferredLinear) else None
        return self._rms_norm(materialise(x), *norm) if normed is None else normed

    def joined(self, x: Tensor, other: "FusedNorm", y: Tensor) -> Tensor | None:
        """The norm of `x [T, w]` and the other's of `y [T, v]` where one kernel gives both; else None."""
        weight, others = (norm._module._parameters["weight"] for norm in (self, other))
        if self._rms_norms is None or self._offset or other._offset or weight is None or others is None:
            return None
        if type(x) is not Tensor or type(y) is not Tensor or {x.dtype, y.dtype, others.dtype} != {weight.dtype}:
            return None
        return self._rms_norms(x, weight, self._eps, y, others, other._eps)


def norms_side_by_side(first: nn.Module, x: Tensor, second: nn.Module, y: Tensor) -> Tensor:
    """`first(x [T, w])` and `second(y [T, v])`, side by side `[T, w + v]`: in one launch where both are fused norms."""
    norm, other = (vars(module).get("forward") for module in (first, second))
    both = norm.joined(x, other, y) if isinstance(norm, FusedNorm) and isinstance(other, FusedNorm) else None
    return torch.cat([first(x), second(y)], -1) if both is None else both


class FusedGate:
    """An MLP down(activation(gate(x)) * up(x)) whose gate and up projections are one product."""

    def __init__(self, projections: FusedProjections, down: nn.Module, activation: str, gate: Callable):
        self._projections, self._down, self._activation, self._gate = projections, down, activation, gate

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self._down(self._gate(self._projections.multiply(x), self._activation))


class FusedRotation:
    """A rotary embedding of queries and keys.

    Inputs the kernel does not take (part of a head, several rows, other layouts) go to the original function."""

    def __init__(self, original: Callable, rotate: Callable):
        self._original, self._rotate = original, rotate

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more, **options):
        """`q [1, H, T, D]`, `k [1, G, T, D]`, `cos` and `sin` `[1, T, D]` -> both rotated."""
        fits = not more and not options and q.ndim == 4 and len(q) == 1 and cos.ndim == 3 and len(cos) == 1
        fits = fits and q.shape[2:] == k.shape[2:] == cos.shape[1:] == sin.shape[1:] and q.shape[3] % 2 == 0
        if not fits or len({x.dtype for x in (q, k, cos, sin)}) > 1 or any(x.stride(-1) != 1 for x in (q, k, cos, sin)):
            return self._original(q, k, cos, sin, *more, **options)
        return self._rotate(q, k, cos, sin)


class RotaryTable:
    """Cosines and sines of all positions, looked up instead of computed; one table `[positions, 2 D]` a layer type."""

    def __init__(self, module: nn.Module, tables: dict[str | None, Tensor]):
        self._module, self._tables = module, tables

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, T, D]` of `position_ids [B, T]`."""
        table = self._tables.get(layer_type)
        if table is None or table.dtype != x.dtype or position_ids.ndim != 2:
            return cos_sin(self._module, x, position_ids, layer_type)
        cos, sin = nn.functional.embedding(position_ids, table).chunk(2, -1)
        return cos, sin


def cos_sin(module: nn.Module, x: Tensor, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
    """Call a rotary embedding module, with `layer_type` if it distinguishes types of layers."""
    return module(x, positions) if layer_type is None else module(x, positions, layer_type)
