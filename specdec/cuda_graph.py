"""CUDA graphs: a function of tensors at fixed addresses, recorded once and launched whole from then on."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WAITED = "called a synchronizing CUDA operation"  # what PyTorch says then
_RECORDING = threading.Lock()  # one recording at a time: they share a stream
_held = threading.local()  # `lists`: what the recordings under way in this thread keep alive


def round_up(number: int, least: int) -> int:
    """`number`, at least `least`, rounded up to a quarter of a power of two.

    >>> [round_up(n, 16) for n in (3, 17, 33, 40, 41)]
    [16, 20, 40, 40, 48]
    """
    number = max(number, least)
    step = 1 << max(0, (number - 1).bit_length() - 3)
    return -(-number // step) * step


class CannotCapture(RuntimeError):
    """A function does something that a CUDA graph cannot hold, such as asking the device."""


class CapturedGraph(Generic[Result]):
    """`function` as a CUDA graph: calling it replays the work on the device and returns what the recorded call
    returned.

    The function must read and write tensors that stay, ask the device nothing, and do no harm when it runs twice
    before. Graphs of one `pool` share memory, so their results live until the next replay of any of them. On a CPU
    nothing can be recorded and the function itself is called. Raises CannotRecord, naming `what`, for a function that
    cannot be recorded."""

    def __init__(self, function: Callable[[], Result], device: torch.device, pool=None, what: str = "the function"):
        self._function, self._graph, self._result, self._kept = function, None, None, []
        if device.type == "cuda":
            lists = _held.__dict__.setdefault("lists", [])
            lists.append(self._kept)
            try:
                with _RECORDING:
                    self._record(device, pool)
            except RuntimeError as error:  # out of memory too: the call may do without
                raise CannotCapture(f'{what} cannot be recorded as a CUDA graph, use mode="eager": {error}') from error
            finally:
                lists.pop()

    def _record(self, device: torch.device, pool) -> None:
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device):
            with torch.cuda.stream(stream):
                self._function()  # kernels are compiled, workspaces taken, tables made
                with _without_waiting():  # what asks the device fails here and breaks no recording
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


@contextmanager
def _without_waiting() -> Iterator[None]:
    """Raise RuntimeError at the end if this thread has waited for the device meanwhile.

    PyTorch's check can only be switched on for all threads; those that wait beside us hear nothing of it.
    """
    waits: list[str] = []
    before, show, thread = torch.cuda.get_sync_debug_mode(), warnings.showwarning, threading.get_ident()

    def heed(message, category, filename, lineno, file=None, line=None) -> None:
        if WAITED not in str(message):
            show(message, category, filename, lineno, file, line)
        elif threading.get_ident() == thread:
            waits.append(f"{filename}, line {lineno}")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{WAITED}")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        warnings.showwarning = heed
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if waits:
        raise RuntimeError(f"it waits for the device, first in {waits[0]}")


def keep_alive(tables: Result) -> Result:
    """`tables`, kept alive by what is being recorded, if anything is: for tensors that lie in a cache which may drop
    them.
    """
    for kept in _held.__dict__.get("lists", ()):
        kept.append(tables)
    return tables


class ByIdentity:
    """A key for one object and no other, equal or not; it keeps the object alive, so that none takes its place."""

    def __init__(self, it: object):
        self._it = it

    def __hash__(self) -> int:
        return id(self._it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other._it is self._it


class GraphCache:
    """Recordings by what they depend on; of more than `size`, the one that was used longest ago goes. What cannot be
    recorded is remembered.
    """

    def __init__(self, size: int):
        self._size, self._made = size, OrderedDict()
        self.count = 0  # recordings made so far

    def get(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """The recording under `key`, made if there is none. Raises CannotRecord."""
        if key not in self._made:
            self.count += 1
            try:
                self._made[key] = make()
            except CannotCapture as error:
                self._made[key] = error
            if len(self._made) > self._size:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        if isinstance(self._made[key], CannotCapture):
            raise self._made[key]
        return self._made[key]

    def clear(self) -> None:
        """Drop them all, and the memory that they hold."""
        self._made.clear()

    def __len__(self) -> int:
        return len(self._made)


class HostCopy:
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
