"""The protocol of a drafter, and what it may read while it proposes."""

from collections.abc import Sequence
from typing import Protocol

from specdec.model.runner import ModelRunner
from specdec.requests.rows import DraftContext
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


class DraftSession(Protocol):
    """A drafter at work on one `generate` call."""

    def propose(self, rows: Sequence[int], tree: TokenTree | None = None) -> Draft:
        """A draft for the active `rows`: node 0 of each is its last accepted token. `tree`: the shape wanted; None
        leaves it to the drafter.
        """

    def commit(self, rows: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Hear which nodes of each row of the last proposal stay, from depth 1 on. Rounds without a proposal pass
        unheard.
        """

    def release(self, rows: Sequence[int]) -> None:
        """Forget rows that have ended; also called, with all rows left, when the call ends or fails."""

    # Optional, for rounds that run without the host: `runs_on_device` (False without it), `state`, what the session
    # keeps in a draft model's cache (a `ModelState`, or None for nothing), `on_device(context: DeviceContext, tree:
    # TokenTree | None) -> DeviceSession`, and `reads`, where in memory weights of its own lie, of which recordings know
    # nothing else (`()` without it).


def is_drafter(given) -> bool:
    """Whether something has the methods of a `Drafter`."""
    return not isinstance(given, type) and all(callable(getattr(given, name, None)) for name in ("validate", "start"))


def require_drafter(drafter) -> None:
    """Raise TypeError for what is no drafter: a model, say."""
    if not is_drafter(drafter):
        given = drafter if isinstance(drafter, type | str | None) else type(drafter).__name__
        raise TypeError(f"a drafter is wanted, such as specdec.ModelDrafter(model), got {given!r}")


class DeviceSession(Protocol):
    """A drafter at work in rounds that the host does not look into: `propose` reads a `DeviceContext` and leaves no
    decision to Python.
    """

    state: (
        object | None
        # a `DeviceModelState` that takes up, in the draft model's cache, what the host's session kept there; None:
        # nothing
    )

    def propose(self, rows: Sequence[int], tree: TokenTree | None = None) -> Draft:
        """As `DraftSession.propose`, for all rows of the context at once."""


class Drafter(Protocol):
    """Anything that proposes. A drafter without state of its own may return itself from `start`."""

    max_tokens: int  # nodes of its own largest tree, without the root
    shapes: str  # what `propose` can be asked for: "tree" (any), "chain" (any length), or "own" (its own shape only)
    # Optional: `max_depth`, that of the deepest tree it can be asked for (no limit without), and `target_tokens`, how
    # many tokens it runs in the target's own cache (none without).

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError, naming the values, when this drafter cannot draft for `target`."""

    def start(self, context: DraftContext, max_tokens: int) -> DraftSession:
        """Begin to draft for one `generate` call, in which no tree is larger than `max_tokens` nodes without the
        root.
        """
