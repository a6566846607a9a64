"""A second device for machines that have none: tensors that compute on the CPU and refuse to meet those of another.

They tell a device of their own, and an operation on tensors of two devices raises as it would on GPUs, but for numbers
without dimensions, which PyTorch lets a CPU hand over, and copies, which `Elsewhere.moves` records."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "hpu"  # a type of device that PyTorch can name, and this machine has not
OTHER, THIRD = torch.device(KIND, 0), torch.device(KIND, 1)
MIXED = "Expected all tensors to be on the same device"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor on `place`, whose numbers are those of `held`, a tensor of the CPU."""

    moves: list[tuple[torch.device, torch.device, torch.dtype, int]] = []  # from, to, of what and of how many numbers

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device | None = None, requires_grad: bool = False):
        held = _held(held)  # accelerate makes a weight anew from one, by its type
        layout = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        with torch.inference_mode(False):  # else views of weights would be of another kind than these
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("meta"), **layout)

    def __init__(self, held: Tensor, place: torch.device | None = None, requires_grad: bool = False):
        self.held, self.place = _held(held), held.device if place is None else place

    @property
    def device(self) -> torch.device:
        """What Python sees; PyTorch's own code, which could not switch to `place`, sees "meta"."""
        return self.place

    def __repr__(self, **options) -> str:
        return f"Elsewhere({self.held}, {self.place})"

    def tolist(self) -> list:
        """Its numbers: the host waits for the device."""
        return self.held.tolist()

    def data_ptr(self) -> int:
        """Where its numbers lie."""
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func._schema.name == "aten::to":
            return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = {x.device for x in tensors if x.device.type != "cpu" or x.ndim}
        if func in COPIES:
            wanted = kwargs.pop("device", None) if func is COPIES[0] else None
            source, place = (args[0], wanted or args[0].device) if func is COPIES[0] else (args[1], args[0].device)
            if source.device != place:
                cls.moves.append((source.device, place, source.dtype, source.numel()))
        elif len(places) > 1:
            raise RuntimeError(f"{func}: {MIXED}, got {sorted(map(str, places))}")
        else:
            place = kwargs.pop("device", None) or next(iter(places), torch.device("cpu"))
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        written = func._schema.arguments[0].alias_info if args else None
        if isinstance(out, Tensor) and written is not None and written.is_write:
            return args[0]
        return tree_map(lambda x: elsewhere(x, torch.device(place)) if isinstance(x, Tensor) else x, out)


def _held(x):
    return x.held if isinstance(x, Elsewhere) else x


def elsewhere(x: Tensor, place: torch.device) -> Tensor:
    """`x`, a tensor of the CPU, on `place`."""
    return x if place.type == "cpu" else Elsewhere(x, place)


class _OtherDevices(TorchFunctionMode):
    """Makes tensors on the other devices where they are asked for, as a device's own factories would."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("scaled_dot_product_attention", "__getitem__"):
            # PyTorch's own code makes masks, and indices of lists, where it sees the tensors
            places = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            if len(places) > 1:
                raise RuntimeError(f"{name}: {MIXED}, got {sorted(map(str, places))}")
            return elsewhere(func(*tree_map(_held, args), **tree_map(_held, kwargs)), next(iter(places)))
        asked = [x for x in (*args, *kwargs.values()) if _names_one(x)]
        if not asked or name in ("__get__", "device"):
            return func(*args, **kwargs)
        place = torch.device(asked[0])
        place = OTHER if place.index is None else place
        args = [x for x in args if not _names_one(x)]
        kwargs = {key: x for key, x in kwargs.items() if not _names_one(x)}
        if name == "to" or name.startswith("new_") or name.endswith("_like"):
            x = args[0]
            if name == "to":
                x = func(x, *args[1:], **kwargs) if len(args) > 1 or kwargs.keys() - {"non_blocking", "copy"} else x
                if x.device == place:
                    return x
                Elsewhere.moves.append((x.device, place, x.dtype, x.numel()))
                return Elsewhere(_held(x).clone(), place)
            return Elsewhere(func(_held(x), *args[1:], **kwargs), place)
        return Elsewhere(func(*args, **kwargs), place)


def _names_one(x: object) -> bool:
    return isinstance(x, str | torch.device) and str(x).split(":")[0] == KIND


@contextmanager
def other_devices() -> Iterator[None]:
    """Let code ask for OTHER and THIRD as for any device; `Elsewhere.moves` begins anew."""
    Elsewhere.moves = []
    with _OtherDevices():
        yield


def move(module: nn.Module, place: torch.device) -> nn.Module:
    """Put all weights and buffers of `module` on `place`."""
    moved_already: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = moved_already.setdefault(id(parameter), nn.Parameter(elsewhere(parameter.data, place), False))
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else elsewhere(buffer, place)
    return module
