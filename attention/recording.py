"""A function of tensors as a flat list of PyTorch operations: what a CPU has in place of a CUDA graph.

One run of the function is watched below PyTorch's dispatcher. Every operation that computes is kept, with the tensors
that it read and wrote; these stay in place, so that running the list again computes the same from what they hold then.
Views, modules and the Python around them cost nothing in a replay.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attention.native.call import in_programs
from attention.recorded_steps import (
    LIFT,
    Step,
    computing_step,
    host_values,
    joined_sums,
    native_step,
    operation_of,
    overwriting_step,
    restoring,
    storage_of,
    tensors_among,
    tensors_in,
    written_tensors,
)

MAX_BYTES = 256 << 20
EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
# memory filled with a number, whatever the tensor that gives the shape holds
FILLED = {f"aten::{name}" for name in ("full_like", "ones_like", "zeros_like", "new_full", "new_ones", "new_zeros")}
_thread = threading.local()  # `recorder`: the one that watches this thread


class CannotRecord(RuntimeError):
    """A function does what a list of operations cannot repeat, such as branching on a tensor's values."""


class Recording:
    """The operations of one run of `function`, and its `result`, which every replay computes anew and in place.

    The function must read and write tensors that stay in place. Raises CannotRecord for one that reads a tensor's
    values on the host, draws random numbers, has outputs whose shapes depend on values, or whose results take more than
    MAX_BYTES, all of which it holds: `bytes`. With `native`, parts of the function that can be kernels in C
    (`attention.native`) are.

    >>> x = torch.ones(2)
    >>> recording = Recording(lambda: (x + 1) * 2)
    >>> recording.result
    tensor([4., 4.])
    >>> x += 1
    >>> recording.replay()
    >>> recording.result
    tensor([6., 6.])
    """

    @torch.inference_mode()
    def __init__(self, function: Callable[[], Any], native: bool = False):
        if current() is not None:
            raise RuntimeError("a recording cannot be made within another one")
        recorder = _thread.recorder = Recorder(native)
        try:
            with _WatchHostValues(), recorder:
                self.result = function()
        finally:
            _thread.recorder = None
        self._steps = in_programs([step.run for step in recorder.steps(self.result)])
        self.bytes = recorder.bytes

    def __len__(self) -> int:
        return len(self._steps)

    @torch.inference_mode()
    def replay(self) -> None:
        """Run all operations again."""
        for step in self._steps:
            step()


def current() -> "Recorder | None":
    """The recorder that watches this thread; None: there is none."""
    return getattr(_thread, "recorder", None)


def unrecorded() -> AbstractContextManager[None]:
    """For memory that is made during a recording, and that the host writes to between replays."""
    return nullcontext() if (recorder := current()) is None else recorder.pause()


class Sink(Protocol):
    """What takes calls of kernels in C: a recorder, or `Direct`, which runs them at once."""

    def leaf(self, run: Callable[[], object], *reads: Tensor, outputs: Sequence[Tensor] = ()) -> None:
        """Take a call that reads `reads` and computes `outputs`."""

    def pause(self) -> AbstractContextManager[None]:
        """For memory that calls write to."""


class Direct:
    """Runs kernels in C at once."""

    def leaf(self, run: Callable[[], object], *reads: Tensor, outputs: Sequence[Tensor] = ()) -> None:
        """Run it."""
        run()

    def pause(self) -> AbstractContextManager[None]:
        """Nothing is recorded anyway."""
        return nullcontext()


@contextmanager
def direct_kernels(wanted: bool) -> Iterator[None]:
    """If `wanted`, parts of what this thread computes meanwhile that can be kernels in C are, without a recording."""
    before = getattr(_thread, "direct", None)
    _thread.direct = Direct() if wanted else before
    try:
        yield
    finally:
        _thread.direct = before


def native_sink() -> Sink | None:
    """Where calls of kernels in C go to now; None: PyTorch's operations are wanted, for their gradients say."""
    recorder = current()
    if recorder is None:
        return None if torch.is_grad_enabled() else getattr(_thread, "direct", None)
    return recorder if recorder.native and not recorder.paused else None


def as_one(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
    """`function(*inputs)`, which a recorder keeps as a single operation: it may read values on the host."""
    recorder = current()
    if recorder is None:
        return function(*inputs)
    with recorder.pause():
        outputs = [x.clone() for x in function(*inputs)]

    def run() -> None:
        for mine, new in zip(outputs, function(*inputs), strict=True):
            mine.copy_(new)

    recorder.leaf(run, *inputs)
    return outputs


class Recorder(TorchDispatchMode):
    """Collects the steps of one run.

    native: whether it wants kernels in C.
    notes: what parts of the function keep here for each other, under keys of their own.
    bytes: of all results, which a recording holds.
    """

    def __init__(self, native: bool = False):
        super().__init__()
        self.native, self.paused, self.bytes = native, False, 0
        self.notes: dict[object, Any] = {}
        self._steps: list[Step] = []
        self._constants: set[int] = set()  # storages that hold what every replay would compute again
        self._kept: list[object] = []  # all tensors seen, so that no address is given to another one

    def is_constant(self, x: Tensor) -> bool:
        """Whether every replay would find the same numbers in `x`."""
        return storage_of(x) in self._constants

    def steps(self, result) -> list[Step]:
        """All steps, with `joined_sums`; `result` is read after the last one."""
        return joined_sums(self._steps, {storage_of(x) for x in tensors_in(result)})

    def leaf(self, run: Callable[[], object], *reads: Tensor, outputs: Sequence[Tensor] = ()) -> None:
        """Call `run` now and in each replay, as one operation.

        It reads `reads` and tensors from outside, computes `outputs`, and may write to other tensors that stay in
        place; see `as_one` for a function that returns new ones."""
        with self.pause():
            run()
        with torch._C.DisableTorchFunction():
            self._count_bytes(outputs)
            self._kept.append(reads)
            self._steps.append(Step(run, frozenset(map(storage_of, reads)), outputs=tuple(outputs)))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing meanwhile."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import its compiler, which takes seconds, to keep it away from this class."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        operation = operation_of(func)
        if operation.composite:
            with self:
                return func.decompose(*args, **kwargs)
        if operation.unrepeatable and (why := host_values(func, operation, args)) is not None:
            raise CannotRecord(why)
        if operation.written and func is not torch.ops.aten.detach_.default:
            return self._overwrite(func, args, kwargs, written_tensors(operation, args, kwargs))
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # a mode sees each look at a tensor
            if operation.views and isinstance(out, Tensor) and storage_of(out) == storage_of(args[0]):
                self._kept.append(out)  # which keeps the memory of its argument
            else:
                self._compute(func, operation.name, args, kwargs, out)
        return out

    def _compute(self, func, name: str, args, kwargs, out) -> None:
        """Keep the step of the operation `name` that has computed `out`."""
        outputs, inputs = tensors_among([out]), tensors_among([*args, *kwargs.values()])
        self._kept.append((outputs, inputs))
        sources, targets = frozenset(map(storage_of, inputs)), frozenset(map(storage_of, outputs))
        if name == LIFT:
            self._constants |= targets
        if targets <= sources or name in EMPTY:
            return  # a view, a fact about shapes, or memory without contents
        self._count_bytes(outputs)
        if sources <= self._constants or name in FILLED:
            self._constants |= targets  # which needs no step: its numbers are there
            return
        known = () if kwargs else (func, args, tuple(outputs))
        run = native_step(func, args, outputs) if self.native and not kwargs else None
        self._steps.append(Step(run or computing_step(func, args, kwargs, outputs), sources, *known))

    def _count_bytes(self, outputs: Sequence[Tensor]) -> None:
        for x in outputs:
            self.bytes += x.untyped_storage().nbytes()
        if self.bytes > MAX_BYTES:
            raise CannotRecord(f"what it computes on the way takes more than {MAX_BYTES >> 20} MiB")

    def _overwrite(self, func, args, kwargs, written: Sequence[Tensor]):
        inputs = tensors_among([*args, *kwargs.values()])
        self._kept.append(inputs)
        for x in written:
            if self.is_constant(x):  # every replay begins with what it holds now
                self._steps.append(Step(restoring(x), frozenset()))
                self._constants.remove(storage_of(x))
        out, run = overwriting_step(func, args, kwargs)
        self._steps.append(Step(run, frozenset(map(storage_of, inputs))))
        return out


class _WatchHostValues(TorchFunctionMode):
    """Raises CannotRecord where values leave PyTorch without an operation that a recorder would see."""

    LEAVING = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.LEAVING:
            recorder = current()
            if recorder is not None and not recorder.paused and not recorder.is_constant(args[0]):
                raise CannotRecord(f"it reads a tensor's values on the host ({func.__name__})")
        return func(*args, **kwargs) if kwargs else func(*args)
