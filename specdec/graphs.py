"""CUDA graphs: a function of tensors at fixed addresses, recorded once and launched whole from then on."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARM_UP = 2  # calls before the recording: kernels are compiled, workspaces taken, tables made


class CannotRecord(RuntimeError):
    """A function does something that a CUDA graph cannot hold, such as asking the device."""


class Recorded(Generic[Result]):
    """`function` as a CUDA graph: calling it replays the work on the device and returns what the recorded call returned.

    The function must read and write tensors that stay, ask the device nothing, and do no harm when it runs `WARM_UP` more times. Graphs of
    one `pool` share memory, so their results live until the next replay of any of them. On a CPU nothing can be recorded and the function
    itself is called. Raises CannotRecord, naming `what`, for a function that cannot be recorded.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device, pool=None, what: str = "the function"):
        self._function, self._graph, self._result = function, None, None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._result = function()
        except RuntimeError as error:
            raise RuntimeError(f'{what} cannot be recorded as a CUDA graph, use mode="eager": {error}') from error

    def __call__(self) -> Result:
        """Launch the recorded work; tensors hold its result once the device gets there."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


class Reply:
    """A tensor on its way to the host: `read` waits for it and for nothing that was launched later."""

    def __init__(self, answer: Tensor):
        self._answer, self._arrived = answer, None
        if answer.is_cuda:
            self._answer = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
            self._answer.copy_(answer, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list:
        """The tensor as nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._answer.tolist()
