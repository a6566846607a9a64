"""Calls of kernels in C with fixed arguments, which a recording replays without Python between them."""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from attention.native.library import PROGRAM, Library

Argument = Tensor | int | float | None


class Call:
    """A kernel with its arguments: pointers, int64 and double, in the order of its struct.

    entry: the addresses of the kernel and of its arguments.
    adding: `adding(other, out)` is a call that computes the result plus `other` into `out`, where there is one."""

    def __init__(self, library: Library, name: str, *arguments: Argument,
                 adding: "Callable[[Tensor, Tensor], Call] | None" = None):  # fmt: skip
        function = library[name]
        with torch._C.DisableTorchFunction():  # a mode, a recorder's say, sees each look at a tensor
            self._values = (ctypes.c_int64 * len(arguments))(*map(_as_int64, arguments))
            # the memory itself: a parameter may be given another one
            self._kept = [x.untyped_storage() for x in arguments if isinstance(x, Tensor)]
        self.entry = ctypes.cast(function, ctypes.c_void_p).value, ctypes.addressof(self._values)
        self._run = partial(function, ctypes.c_void_p(self.entry[1]))
        self.adding = adding

    def __call__(self) -> None:
        """Run it."""
        self._run()


class Program:
    """Calls that run one after the other, as one."""

    def __init__(self, calls: Sequence[Call]):
        self._calls = calls
        self._steps = (ctypes.c_void_p * (2 * len(calls)))(*(value for call in calls for value in call.entry))
        self._run = partial(PROGRAM["run"], self._steps, ctypes.c_int64(len(calls)))

    def __call__(self) -> None:
        """Run them."""
        self._run()


def in_programs(functions: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The functions, with neighbouring calls as one program each."""
    joined: list[Callable[[], object]] = []
    calls: list[Call] = []
    for function in [*functions, None]:
        if isinstance(function, Call):
            calls.append(function)
            continue
        if calls:
            joined.append(calls[0] if len(calls) == 1 else Program(calls))
            calls = []
        if function is not None:
            joined.append(function)
    return joined


def _as_int64(argument: Argument) -> int:
    if type(argument) is int:  # most are
        return argument
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return struct.unpack("q", struct.pack("d", argument))[0]
    return 0 if argument is None else int(argument)
