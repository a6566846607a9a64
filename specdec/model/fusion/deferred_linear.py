"""A product that is put off until somebody reads it: a layer's last product is mostly added to what came in, and the
sum then normalised. What of that can be one kernel is."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specdec.model.fusion.skinny_linear import Norm, skinny_linear, skinny_linear_and_norm


class DeferredLinear(Tensor):
    """`x [..., in]` times `weight [out, in]` transposed, plus `bias [out]`: `[..., out]`, not computed yet.

    Plus a tensor of its shape and dtype it is another one, with that `added`: product and sum are computed at once, and
    in a kernel rounded once. Whatever else is done with it is done with the numbers. Until then nobody may change `x`
    or `added` in place."""

    @staticmethod
    def __new__(cls, x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None):
        """A tensor without memory of its own."""
        return Tensor._make_wrapper_subclass(cls, (*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None):
        self._factors, self._added, self._product = (x, weight, bias), added, None

    def __repr__(self) -> str:
        return f"DeferredLinear(shape={list(self.shape)}, dtype={self.dtype})"

    def product(self) -> Tensor:
        """The product, or the sum: an ordinary tensor."""
        if self._product is None:
            self._keep(skinny_linear(*self._factors, added=self._added))
        return self._product

    def normed(self, norm: Norm) -> Tensor | None:
        """Its norm, if that comes with the product; else None."""
        normed = None
        if self._product is None:
            product, normed = skinny_linear_and_norm(*self._factors, self._added, norm)
            self._keep(product)
        return normed

    def _keep(self, product: Tensor) -> None:
        self._product, self._factors, self._added = product, None, None

    def can_fuse(self, added) -> bool:
        """Whether the numbers of `added` can become part of it."""
        if (
            self._product is not None
            or self._added is not None
            or added is self
            or type(added) not in (Tensor, DeferredLinear)
        ):
            return False
        return added.shape == self.shape and added.dtype == self.dtype

    def data_ptr(self) -> int:
        """Where the numbers lie."""
        return self.product().data_ptr()

    def numpy(self, **options):
        """The numbers as a NumPy array."""
        return self.product().numpy(**options)

    def tolist(self) -> list:
        """The numbers."""
        return self.product().tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.product().clone()

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are no Pending

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """What PyTorch calls in place of an operation."""
        if operation is torch.ops.aten.add.Tensor and not kwargs:
            for pending, added in (args[::-1], args):
                if isinstance(pending, DeferredLinear) and pending.can_fuse(added):
                    return DeferredLinear(*pending._factors, materialise(added))
        if operation is torch.ops.aten.dropout.default and not args[2]:  # not in training: nothing to do
            return args[0]
        return operation(
            *tree_map_only(DeferredLinear, DeferredLinear.product, args),
            **tree_map_only(DeferredLinear, DeferredLinear.product, kwargs or {}),
        )


def materialise(x: Tensor) -> Tensor:
    """An ordinary tensor of the same numbers."""
    return x.product() if isinstance(x, DeferredLinear) else x
