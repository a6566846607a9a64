"""CUDA graphs: a function of tensors at fixed addresses, recorded once and launched whole from then on."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")
_RECORDING = threading.Lock()  # one recording at a time: they share a stream
_held = threading.local()  # `lists`: what the recordings under way in this thread keep alive


def roomy(number: int, least: int) -> int:
    """`number`, at least `least`, rounded up to a quarter of a power of two.

    >>> [roomy(n, 16) for n in (3, 17, 33, 40, 41)]
    [16, 20, 40, 40, 48]
    """
    number = max(number, least)
    step = 1 << max(0, (number - 1).bit_length() - 3)
    return -(-number // step) * step


class CannotRecord(RuntimeError):
    """A function does something that a CUDA graph cannot hold, such as asking the device."""


class Recorded(Generic[Result]):
    """`function` as a CUDA graph: calling it replays the work on the device and returns what the recorded call returned.

    The function must read and write tensors that stay, ask the device nothing, and do no harm when it runs twice before. Graphs of one
    `pool` share memory, so their results live until the next replay of any of them. On a CPU nothing can be recorded and the function itself
    is called. Raises CannotRecord, naming `what`, for a function that cannot be recorded.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device, pool=None, what: str = "the function"):
        self._function, self._graph, self._result, self._kept = function, None, None, []
        if device.type == "cuda":
            lists = _held.__dict__.setdefault("lists", [])
            lists.append(self._kept)
            try:
                with _RECORDING:
                    self._record(device, pool)
            except RuntimeError as error:  # out of memory too: the call may do without
                raise CannotRecord(f'{what} cannot be recorded as a CUDA graph, use mode="eager": {error}') from error
            finally:
                lists.pop()

    def _record(self, device: torch.device, pool) -> None:
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device):
            with torch.cuda.stream(stream):
                self._function()  # kernels are compiled, workspaces taken, tables made
                with RefuseWaits():  # what asks the device fails here and breaks no recording
                    self._function()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._result = self._function()
        torch.cuda.current_stream(device).wait_stream(stream)

    def __call__(self) -> Result:
        """Launch the recorded work; tensors hold its result once the device gets there."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


@cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    """One for all recordings of a device: libraries keep a workspace for every stream that they meet."""
    return torch.cuda.Stream(device)


class RefuseWaits(TorchDispatchMode):
    """Raises RuntimeError where this thread would wait for the device: for a number, for a shape that depends on numbers, for a copy to or from the host.

    PyTorch's own check of that kind (its sync debug mode) would fail in every other thread too.
    """

    ANSWERS = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "equal",
               "bincount", "argwhere"}  # fmt: skip

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Look at an operation, then do it."""
        name, given = operation.__name__.split(".")[0], kwargs or {}
        tensors = [x for x in args if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for x in tensors)
        waits = on_device and name in self.ANSWERS
        if name in ("index", "index_put", "index_put_") and on_device:
            waits = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name == "repeat_interleave" and on_device:
            waits = given.get("output_size") is None and isinstance(args[-1], Tensor)
        if name in ("_to_copy", "copy_") and tensors:
            target = torch.device(given["device"]) if given.get("device") is not None else tensors[0].device
            waits = target.type != tensors[-1].device.type and not (given.get("non_blocking") or name == "copy_" and len(args) > 2 and args[2])
        if waits:
            raise RuntimeError(f"{operation} waits for the device")
        return operation(*args, **given)


def hold(tables: Result) -> Result:
    """`tables`, kept alive by what is being recorded, if anything is: for tensors that lie in a cache which may drop them."""
    for kept in _held.__dict__.get("lists", ()):
        kept.append(tables)
    return tables


class Itself:
    """A key for one object and no other, equal or not; it keeps the object alive, so that none takes its place."""

    def __init__(self, it: object):
        self._it = it

    def __hash__(self) -> int:
        return id(self._it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other._it is self._it


class Shelf:
    """Recordings by what they depend on; of more than `size`, the one that was used longest ago goes. What cannot be recorded is remembered."""

    def __init__(self, size: int):
        self._size, self._made = size, OrderedDict()
        self.count = 0  # recordings made so far

    def get(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """The recording under `key`, made if there is none. Raises CannotRecord."""
        if key not in self._made:
            self.count += 1
            try:
                self._made[key] = make()
            except CannotRecord as error:
                self._made[key] = error
            if len(self._made) > self._size:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        if isinstance(self._made[key], CannotRecord):
            raise self._made[key]
        return self._made[key]

    def clear(self) -> None:
        """Drop them all, and the memory that they hold."""
        self._made.clear()

    def __len__(self) -> int:
        return len(self._made)


class Reply:
    """A tensor on its way to the host: `read` waits for it and for nothing that was launched later."""

    def __init__(self, answer: Tensor):
        self._answer, self._arrived = answer, None
        if answer.is_cuda:
            self._answer = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
            self._answer.copy_(answer, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(answer.device))

    def read(self) -> list:
        """The tensor as nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._answer.tolist()
