"""A product that is put off until somebody reads it: a layer's last product is mostly added to what came in, and both together are one kernel."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attention.few_rows import few_rows_linear


class Pending(Tensor):
    """`x [..., in]` times `weight [out, in]` transposed, plus `bias [out]`: `[..., out]`, not computed yet.

    To add a tensor of its shape and dtype computes product and sum at once; in a kernel they are rounded once. Whatever else is done with it is
    done with the product. Until then nobody may change `x` in place.
    """

    @staticmethod
    def __new__(cls, x: Tensor, weight: Tensor, bias: Tensor | None):
        """A tensor without memory of its own."""
        return Tensor._make_wrapper_subclass(cls, (*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None):
        self._factors, self._product = (x, weight, bias), None

    def __repr__(self) -> str:
        return f"Pending(shape={list(self.shape)}, dtype={self.dtype})"

    def product(self) -> Tensor:
        """An ordinary tensor."""
        if self._product is None:
            self._product = few_rows_linear(*self._factors)
        return self._product

    def plus(self, added: Tensor) -> Tensor:
        """The product and a tensor of its shape."""
        return few_rows_linear(*self._factors, added=added) if self._product is None else self._product + added

    def data_ptr(self) -> int:
        """Where the product lies."""
        return self.product().data_ptr()

    def numpy(self, **options):
        """The product as a NumPy array."""
        return self.product().numpy(**options)

    def tolist(self) -> list:
        """The product's numbers."""
        return self.product().tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.product().clone()

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are no Pending

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """What PyTorch calls in place of an operation."""
        if operation is torch.ops.aten.add.Tensor and not kwargs:
            added, pending = args if isinstance(args[1], Pending) else args[::-1]
            if type(added) is Tensor and added.shape == pending.shape and added.dtype == pending.dtype:
                return pending.plus(added)
        if operation is torch.ops.aten.dropout.default and not args[2]:  # not in training: nothing to do
            return args[0]
        return operation(*tree_map_only(Pending, Pending.product, args), **tree_map_only(Pending, Pending.product, kwargs or {}))


def whole(x: Tensor) -> Tensor:
    """An ordinary tensor of the same numbers."""
    return x.product() if isinstance(x, Pending) else x
