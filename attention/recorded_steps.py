"""Turns an operation that a recorder has seen into a function without arguments that runs it again, in place."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from attention.native.call import Call
from attention.native.library import HERE, Library


@dataclass(frozen=True, slots=True)
class Step:
    """What a replay calls, `run`, and the storages that it reads.

    func, args: the operation that it computes, if it is a single one without options.
    outputs: what it computes, if nothing else can read that before."""

    run: Callable[[], object]
    reads: frozenset[int]
    func: object = None
    args: Sequence = ()
    outputs: tuple[Tensor, ...] = ()


COPYING = {"aten::clone", "aten::_to_copy", "aten::contiguous", "aten::lift_fresh_copy"}
UNREPEATABLE = {
    torch.Tag.data_dependent_output: "it reads a tensor's values on the host",
    torch.Tag.nondeterministic_seeded: "it draws random numbers",
    torch.Tag.dynamic_output_shape: "the shape of its output depends on values",
}
LIFT = "aten::lift_fresh"  # `torch.tensor` with numbers of the host
OPERATIONS = Library(HERE / "operations.c")
NATIVE = {
    torch.ops.aten.embedding.default: "embedding",
    torch.ops.aten.add.Tensor: "add",
    torch.ops.aten.mul.Tensor: "mul",
    torch.ops.aten.silu.default: "silu",
}
_chosen: dict[object, Callable] = {}  # operation -> what to call for it, found by trying once


@dataclass(frozen=True, slots=True)
class Operation:
    """What is true of every call of an operation.

    name: of its schema.
    composite: it only calls others.
    views: its result may lie in the memory of its first argument, and then computes nothing.
    unrepeatable: why a list of operations cannot repeat it, unless a call is harmless.
    written: the places and names of the arguments that it writes to."""

    name: str
    composite: bool
    views: bool
    unrepeatable: tuple[str, ...]
    written: tuple[tuple[int, str], ...]


@cache
def operation_of(func) -> Operation:
    """The facts about `func`."""
    schema = func._schema
    written = [
        (i, x.name) for i, x in enumerate(schema.arguments) if x.alias_info is not None and x.alias_info.is_write
    ]
    return Operation(
        schema.name,
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        not written and schema.name != LIFT and any(x.alias_info is not None for x in schema.returns),
        tuple(why for tag, why in UNREPEATABLE.items() if tag in func.tags),
        tuple(written),
    )


def host_values(func, operation: Operation, args: Sequence) -> str | None:
    """Why a list of operations cannot repeat this call of `func`; None: it can."""
    for why in operation.unrepeatable:
        if not _harmless(func, args):
            return f"{why} ({operation.name.split('::')[1]})"
    return None


def _harmless(func, args: Sequence) -> bool:
    """Whether a call does not do what `func` may do: an index without masks, attention without dropout."""
    if func is torch.ops.aten.index.Tensor:
        return not _has_mask(args[1])
    return any(parameter.name == "dropout_p" for parameter in func._schema.arguments)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def written_tensors(operation: Operation, args: Sequence, kwargs: dict) -> list[Tensor]:
    """The arguments that a call of `operation` writes to."""
    return tensors_among([args[i] if i < len(args) else kwargs.get(name) for i, name in operation.written])


def overwriting_step(func, args: Sequence, kwargs: dict) -> tuple[Any, Callable[[], object]]:
    """Run an operation that writes to its arguments -> its result, and the step."""
    name = func._schema.name.split("::")[1]
    native = getattr(Tensor, name, None) if name.endswith("_") else getattr(torch, name, None)
    call = native or func
    try:
        return call(*args, **kwargs), partial(call, *args, **kwargs)
    except TypeError:  # PyTorch's own function does not take these arguments, None in a list of indices say
        return func(*args, **kwargs), partial(func, *args, **kwargs)


def restoring(x: Tensor) -> Callable[[], object]:
    """A function that writes back what the whole memory of `x` holds now."""
    memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    return partial(memory.copy_, memory.clone())


def computing_step(func, args: Sequence, kwargs: dict, outputs: Sequence[Tensor]) -> Callable[[], object]:
    """The step for an operation that has computed `outputs`: it computes them again, into the same memory."""
    if func._schema.name in COPYING:
        return partial(outputs[0].copy_, args[0])
    into = outputs[0] if len(outputs) == 1 else tuple(outputs)
    if func not in _chosen:
        _chosen[func] = _best(func, args, kwargs, outputs, into)
    call = _chosen[func]
    if call is not _compute_and_copy:
        try:
            call(*args, **kwargs, out=into)
            return partial(call, *args, **kwargs, out=into)
        except (TypeError, RuntimeError, NotImplementedError):  # other arguments than those of the trial
            pass
    return partial(_compute_and_copy, func, args, kwargs, outputs)


def native_step(func, args: Sequence, outputs: Sequence[Tensor]) -> Call | None:
    """The step as a kernel in C, where there is one that computes the same."""
    name, dense = NATIVE.get(func), [x for x in (*args[:2], *outputs) if isinstance(x, Tensor)]
    if name is None or not all(x.is_contiguous() and is_plain(x) for x in dense):
        return None
    (out,) = outputs
    if name == "embedding":
        table, places = args[:2]
        sizes = places.numel(), len(table), table.shape[1] * table.element_size()
        return Call(OPERATIONS, name, table, places, out, *sizes) if places.dtype == torch.int64 else None
    if len(dense) != len(args) + 1 or any(x.dtype != torch.float32 or x.shape != out.shape for x in dense):
        return None  # numbers, broadcast or promoted
    return Call(OPERATIONS, name, args[0], args[1] if len(args) == 2 else None, out, out.numel())


def _compute_and_copy(func, args: Sequence, kwargs: dict, outputs: Sequence[Tensor]) -> None:
    found = func(*args, **kwargs)
    for mine, new in zip(outputs, [found] if isinstance(found, Tensor) else found, strict=True):
        mine.copy_(new)


def _best(func, args: Sequence, kwargs: dict, outputs: Sequence[Tensor], into) -> Callable:
    """The first of the functions with an `out` argument that gives what `func` gave."""
    before = [x.clone() for x in outputs]
    for call in _with_out(func):
        for x, kept in zip(outputs, before, strict=True):  # other numbers, which it must overwrite
            x.copy_(~kept if kept.dtype == torch.bool else kept + 1)
        try:
            call(*args, **kwargs, out=into)
        except (TypeError, RuntimeError, NotImplementedError):
            continue
        if all(_same(x, kept) for x, kept in zip(outputs, before, strict=True)):
            return call
    for x, kept in zip(outputs, before, strict=True):
        x.copy_(kept)
    return _compute_and_copy


def _with_out(func) -> Iterator[Callable]:
    """PyTorch's own functions of that name first: calling an operation as such costs about a microsecond more."""
    name = func._schema.name.split("::")[1]
    if func is torch.ops.aten.embedding.default:
        yield _embedding
    for namespace in (torch, torch._C._nn, torch.special, torch.linalg):
        if callable(found := getattr(namespace, name, None)):
            yield found


def _embedding(weight: Tensor, indices: Tensor, *_, out: Tensor) -> None:
    torch.index_select(weight, 0, indices.flatten(), out=out.view(-1, weight.shape[1]))


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a != a) & (b != b)).all())


def joined_sums(steps: Sequence[Step], kept: set[int]) -> list[Step]:
    """The steps, with a matrix product and a sum right after it as one operation.

    kept: storages that are read after the last step."""
    reads = Counter(storage for step in steps for storage in step.reads)
    joined: list[Step] = []
    for step in steps:
        before = joined[-1] if joined else None
        if before is not None and _is_product(before) and step.func is torch.ops.aten.add.Tensor:
            (product,) = map(storage_of, before.outputs)
            if product not in kept and reads[product] == 1 and (run := _sum_with_product(before, step)) is not None:
                joined[-1] = Step(run, before.reads | step.reads - {product})
                continue
        joined.append(step)
    return joined


def _is_product(step: Step) -> bool:
    if isinstance(step.run, Call):
        return step.run.adding is not None
    return step.func is torch.ops.aten.mm.default


def _sum_with_product(product: Step, addition: Step) -> Callable[[], object] | None:
    """The step for both; None where their arguments do not fit."""
    (matrix,), (out,) = product.outputs, addition.outputs
    a, b = addition.args
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.numel() != matrix.numel():
        return None
    of_product = [storage_of(x) == storage_of(matrix) for x in (a, b)]
    other = b if of_product[0] else a
    plain = all(x.is_contiguous() and x.dtype == matrix.dtype for x in (a, b, out))
    if of_product.count(True) != 1 or not plain:
        return None
    if isinstance(product.run, Call) and product.run.adding is not None:
        return product.run.adding(other, out)
    return partial(torch.addmm, other.view(matrix.shape), *product.args, out=out.view(matrix.shape))


def tensors_in(tree) -> list[Tensor]:
    """All tensors in nested containers."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def tensors_among(values: Iterable) -> list[Tensor]:
    """All tensors among the arguments or results of an operation, which may be lists of them: much faster."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def is_plain(x: Tensor) -> bool:
    """Whether a tensor or parameter is of no other class, whose numbers may lie elsewhere."""
    return type(x) in (Tensor, torch.nn.Parameter)


def storage_of(x: Tensor) -> int:
    """Which memory a tensor lies in."""
    return x.untyped_storage()._cdata
