"""CUDA graphs: a function of tensors at fixed addresses, captured once and then replayed by one launch."""

import gc
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from attention.recording import Recording

Result = TypeVar("Result")
MAX_BYTES = 512 << 20  # of the graphs in a cache on a CPU
SYNCHRONISED = "called a synchronizing CUDA operation"  # PyTorch's warning for an operation that waits for the device
_CAPTURING = threading.Lock()  # one capture at a time, as captures of a device share a stream
_thread = threading.local()  # `kept`: lists of the objects that the captures running in this thread keep alive


def round_up(number: int, least: int) -> int:
    """`number`, at least `least`, rounded up to a quarter of a power of two.

    >>> [round_up(n, 16) for n in (3, 17, 33, 40, 41)]
    [16, 20, 40, 40, 48]
    """
    number = max(number, least)
    step = 1 << max(0, (number - 1).bit_length() - 3)
    return -(-number // step) * step


def up_to_power(number: int) -> int:
    """The least power of two that is at least `number`.

    >>> [up_to_power(n) for n in (1, 2, 3, 9)]
    [1, 2, 4, 16]
    """
    return 1 << (number - 1).bit_length()


class CannotCapture(RuntimeError):
    """A function does something that a CUDA graph cannot hold, such as reading a tensor's value on the host."""


class CapturedGraph(Generic[Result]):
    """`function` as a CUDA graph: a call replays its kernels and returns the tensors that the captured call returned.

    The function must read and write tensors that stay in place, must not synchronise with the device, and must be
    harmless to run twice before the capture. Graphs of one `pool` share memory, so their results are valid until the
    next replay of any of them. On a CPU the graph is a list of operations (`attention.recording`), if `compiled` with
    kernels in C (`attention.native`). Raises CannotCapture, naming `what`, for a function that cannot be captured."""

    def __init__(self, function: Callable[[], Result], device: torch.device, pool=None, what: str = "the function",
                 compiled: bool = False):  # fmt: skip
        self._function, self.bytes = function, 0  # of memory on a CPU
        self._kept: list[object] = []
        kind, lists = "a CUDA graph" if device.type == "cuda" else "a list", _thread.__dict__.setdefault("kept", [])
        lists.append(self._kept)
        try:
            if device.type == "cuda":
                with _CAPTURING:
                    graph, self._result = self._capture(device, pool)
                self._replay: Callable[[], object] = graph.replay
            else:
                recording = Recording(function, native=compiled)
                self._replay, self._result, self.bytes = recording.replay, recording.result, recording.bytes
        except RuntimeError as error:  # includes out of memory: the caller may run without a graph
            raise CannotCapture(f'{what} cannot be recorded as {kind}, use mode="eager": {error}') from error
        finally:
            lists.pop()

    def _capture(self, device: torch.device, pool) -> tuple[torch.cuda.CUDAGraph, Result]:
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device):
            try:
                with torch.cuda.stream(stream):
                    self._function()  # compiles kernels, allocates workspaces, fills caches
                    with _forbid_synchronising():  # raises here, where it does not break a capture
                        self._function()
                graph = torch.cuda.CUDAGraph()
                recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
                with _no_garbage_collection(), recording:
                    result = self._function()
            finally:  # what follows, after a failure too, writes to the tensors that the function uses
                torch.cuda.current_stream(device).wait_stream(stream)
        return graph, result

    def __call__(self) -> Result:
        """Replay the graph without waiting for it."""
        self._replay()
        return self._result


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures of a device, since libraries allocate a workspace for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Leave reference cycles alone: freeing a graph, an event or pinned memory of theirs can break a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _forbid_synchronising() -> Iterator[None]:
    """Raise RuntimeError at the end if this thread has waited for the device meanwhile.

    PyTorch's check is switched on for all threads; what other threads do is ignored.
    """
    places: list[str] = []
    before, show, thread = torch.cuda.get_sync_debug_mode(), warnings.showwarning, threading.get_ident()

    def collect(message, category, filename, lineno, file=None, line=None) -> None:
        if SYNCHRONISED not in str(message):
            show(message, category, filename, lineno, file, line)
        elif threading.get_ident() == thread:
            places.append(f"{filename}, line {lineno}")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{SYNCHRONISED}")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        warnings.showwarning = collect
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if places:
        raise RuntimeError(f"it waits for the device, first in {places[0]}")


def keep_alive(tables: Result) -> Result:
    """`tables`, referenced by the graph being captured, if any: for tensors in a cache that may drop them."""
    for kept in _thread.__dict__.get("kept", ()):
        kept.append(tables)
    return tables


class ByIdentity:
    """A dictionary key that compares by identity; it holds a reference, so that the object's id cannot be reused."""

    def __init__(self, it: object):
        self._it = it

    def __hash__(self) -> int:
        return id(self._it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other._it is self._it


class GraphCache:
    """An LRU cache of up to `size` graphs, whose `bytes_of` add up to MAX_BYTES, and of failures to capture them."""

    def __init__(self, size: int, bytes_of: Callable[[Any], int] = lambda graph: 0):
        self._size, self._bytes_of = size, bytes_of
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self.count = 0  # graphs made so far

    def get(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """The graph under `key`, made by `make` if there is none. Raises CannotCapture, again for each such call."""
        if key not in self._graphs:
            self.count += 1
            try:
                self._graphs[key] = make()
            except CannotCapture as error:
                self._graphs[key] = error
            while len(self._graphs) > self._size or len(self._graphs) > 1 and self._bytes() > MAX_BYTES:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        if isinstance(self._graphs[key], CannotCapture):
            raise self._graphs[key]
        return self._graphs[key]

    def held(self, key: Hashable) -> Any:
        """The graph under `key`; None where there is none, or it could not be captured."""
        graph = self._graphs.get(key)
        return None if isinstance(graph, CannotCapture) else graph

    def _bytes(self) -> int:
        return sum(self._bytes_of(graph) for graph in self._graphs.values() if not isinstance(graph, CannotCapture))

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        self._graphs.clear()

    def __len__(self) -> int:
        return len(self._graphs)


class HostCopy:
    """A copy of a tensor to the host, started at once; `read` waits for it but for no work launched later."""

    def __init__(self, source: Tensor):
        self._copy, self._finished = source, None
        if source.is_cuda:
            self._copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._copy.copy_(source, non_blocking=True)
            self._finished = torch.cuda.Event()
            self._finished.record(torch.cuda.current_stream(source.device))

    def read(self) -> list:
        """The tensor as nested lists."""
        if self._finished is not None:
            self._finished.synchronize()
        return self._copy.tolist()
