"""The debug flag of the cache's bookkeeping: with `SPECDEC_CHECK_KV=1` every change ends with a check of all of it.

It finds the call that breaks something rather than a later one that trips over it, and costs time for every page."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Checkable(Protocol):
    """Bookkeeping that can check itself."""

    @property
    def debug(self) -> bool:
        """Whether every change ends with `check_integrity`."""

    def check_integrity(self) -> None:
        """Raise RuntimeError where its parts contradict each other."""


Owner = TypeVar("Owner", bound=Checkable)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def debug_from_environment() -> bool:
    """Whether the environment variable `SPECDEC_CHECK_KV` is "1"."""
    return os.environ.get("SPECDEC_CHECK_KV") == "1"


def checked(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """`method`, which ends with `check_integrity()` of its object where that object's `debug` is true."""

    @wraps(method)
    def run(self: Owner, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        result = method(self, *args, **kwargs)
        if self.debug:
            self.check_integrity()
        return result

    return run
