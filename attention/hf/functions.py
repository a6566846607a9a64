"""Copies of functions in which one global name has another value; their decorators are copied too."""

import inspect
from types import CellType, FunctionType


def uses(function, name: str) -> bool:
    """Whether a function reads the global `name`; its decorators do not count.

    >>> uses(uses, "inspect"), uses(uses, "CellType")
    (True, False)
    """
    plain = inspect.unwrap(function)
    return isinstance(plain, FunctionType) and name in plain.__code__.co_names and name in plain.__globals__


def with_global(function, name: str, value) -> FunctionType | None:
    """A copy of `function`, with its decorators, in which the global `name` is `value`.

    A decorator made with `functools.wraps` holds the decorated function in its closure, so it is copied with another
    closure. None where a decorator cannot be copied that way.

    >>> with_global(uses, "FunctionType", int)(uses, "inspect")
    False
    """
    if not isinstance(function, FunctionType):
        return None
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return _copy(function, function.__globals__ | {name: value}, function.__closure__)
    changed, cells = with_global(wrapped, name, value), function.__closure__ or ()
    if changed is None or not any(_content(cell) is wrapped for cell in cells):
        return None
    closure = tuple(CellType(changed) if _content(cell) is wrapped else cell for cell in cells)
    copied = _copy(function, function.__globals__, closure)
    vars(copied)["__wrapped__"] = changed
    return copied


def _content(cell: CellType):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _copy(function: FunctionType, names: dict, closure) -> FunctionType:
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made
