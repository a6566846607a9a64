"""A linear layer's output that is computed on first use, so that a following residual sum and norm can be fused."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specdec.model.fusion.product_inputs import Norm
from specdec.model.fusion.quantised.packed import PackedWeight
from specdec.model.fusion.skinny_linear import skinny_linear, skinny_linear_and_norm

Factors = tuple[Tensor, Tensor | PackedWeight, Tensor | None]


class DeferredLinear(Tensor):
    """`x [..., in]` @ `weight [out, in]`.T + `bias [out]` + `added [..., out]`, computed on first use.

    Adding a tensor of the same shape and dtype makes a new one with it as `added`: product and sum are then computed at
    once, in a kernel with one rounding. Any other operation gets the computed numbers. Until then `x` and `added` must
    not be changed in place."""

    @staticmethod
    def __new__(cls, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, added: Tensor | None = None):
        """A tensor without memory of its own."""
        return Tensor._make_wrapper_subclass(cls, (*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)

    def __init__(self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, added: Tensor | None = None):
        self._factors: Factors | None = (x, weight, bias)
        self._added = added
        self._product: Any = None

    def __repr__(self, *, tensor_contents=None):  # type: ignore[override]
        return f"DeferredLinear(shape={list(self.shape)}, dtype={self.dtype})"

    def product(self) -> Tensor:
        """The result as an ordinary tensor."""
        if self._factors is not None:
            self._keep(skinny_linear(*self._factors, added=self._added))
        return self._product

    def normed(self, norm: Norm) -> Tensor | None:
        """The norm of the result where one kernel computes both; else None."""
        if self._factors is None:
            return None
        product, normed = skinny_linear_and_norm(*self._factors, self._added, norm)
        self._keep(product)
        return normed

    def _keep(self, product: Tensor) -> None:
        self._product, self._factors, self._added = product, None, None

    def can_fuse(self, added) -> bool:
        """Whether `added` can still become part of the computation."""
        if self._factors is None or self._added is not None or added is self:
            return False
        return type(added) in (Tensor, DeferredLinear) and added.shape == self.shape and added.dtype == self.dtype

    def data_ptr(self) -> int:
        """The address of the computed numbers."""
        return self.product().data_ptr()

    def numpy(self, **options):
        """The numbers as a NumPy array."""
        return self.product().numpy(**options)

    def tolist(self) -> list:
        """The numbers as nested lists."""
        return self.product().tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.product().clone()

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # results are ordinary tensors

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):  # type: ignore[override]
        """Called by PyTorch in place of each operation."""
        if operation is torch.ops.aten.add.Tensor and not kwargs:
            for deferred, added in (args[::-1], args):
                if isinstance(deferred, DeferredLinear) and deferred._factors and deferred.can_fuse(added):
                    return DeferredLinear(*deferred._factors, materialise(added))
        if operation is torch.ops.aten.dropout.default and not args[2]:  # in eval mode dropout does nothing
            return args[0]
        return operation(
            *tree_map_only(DeferredLinear, DeferredLinear.product, args),
            **tree_map_only(DeferredLinear, DeferredLinear.product, kwargs or {}),
        )


def materialise(x: Tensor) -> Tensor:
    """`x` as an ordinary tensor."""
    return x.product() if isinstance(x, DeferredLinear) else x
