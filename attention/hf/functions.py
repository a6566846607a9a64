"""A function of transformers with another meaning for one of the names that it uses, decorators and all."""

import inspect
from types import CellType, FunctionType


def uses(function, name: str) -> bool:
    """Whether a function, below its decorators, reads the global `name`.

    >>> uses(uses, "inspect"), uses(uses, "CellType")
    (True, False)
    """
    plain = inspect.unwrap(function)
    return isinstance(plain, FunctionType) and name in plain.__code__.co_names and name in plain.__globals__


def with_global(function, name: str, value) -> FunctionType | None:
    """`function` with `value` for the global `name`, its decorators around it as before; None where one of them cannot
    be made anew.

    A decorator made by `functools.wraps` holds what it wraps in its closure: it is copied with the changed function
    there.

    >>> with_global(uses, "FunctionType", int)(uses, "inspect")
    False
    """
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return (
            _copied(function, function.__globals__ | {name: value}, function.__closure__)
            if isinstance(function, FunctionType)
            else None
        )
    changed = with_global(wrapped, name, value)
    cells = function.__closure__ or () if isinstance(function, FunctionType) else ()
    held = [_content(cell) is wrapped for cell in cells]
    if changed is None or not any(held):
        return None
    made = _copied(
        function,
        function.__globals__,
        tuple(CellType(changed) if inner else cell for cell, inner in zip(cells, held, strict=True)),
    )
    made.__wrapped__ = changed
    return made


def _content(cell: CellType):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _copied(function: FunctionType, names: dict, closure) -> FunctionType:
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made
