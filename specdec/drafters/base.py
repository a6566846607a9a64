"""The protocols of drafters: what proposes, its session during a call, and its state in a draft model's cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from specdec.model.features import Features
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree

SHAPES = ("tree", "chain", "own")


@dataclass(frozen=True, slots=True)
class DrafterTraits:
    """What the loop has to know of a drafter.

    `max_tokens`: nodes of its own largest tree, without the root. `shapes`: what `propose` can be asked for: "tree"
    (any), "chain" (any length) or "own" (its own shape only). `max_depth`: of the deepest tree it can be asked for
    (None: no limit). `target_tokens`: tokens that it runs in the target's own cache. `captured`: whether `propose` can
    be captured in a CUDA graph, because it reads tensors of the batch only. `features`: the hidden states that it finds
    in `Batch.features` (None: none), of the last accepted token only so far. Raises ValueError for a value outside
    these.
    """

    max_tokens: int
    shapes: str = "own"
    max_depth: int | None = None
    target_tokens: int = 0
    captured: bool = False
    features: Features | None = None

    def __post_init__(self):
        if self.max_tokens < 1 or self.target_tokens < 0 or (self.max_depth is not None and self.max_depth < 1):
            raise ValueError(
                f"max_tokens and max_depth must be at least 1 and target_tokens at least 0, got {self.max_tokens}, "
                f"{self.max_depth} and {self.target_tokens}"
            )
        if self.features is not None and self.features.tokens != "last":
            raise ValueError(f'rounds keep features of the "last" token only so far, got {self.features}')
        if self.shapes not in SHAPES:
            raise ValueError(f"shapes must be one of {', '.join(SHAPES)}, got {self.shapes!r}")


class DraftState(Protocol):
    """What a session keeps of each row in a draft model's cache."""

    runner: ModelRunner
    draft_room: int  # tokens of its own that captured rounds append past those of a row

    def catch_up(self, batch: Batch, anew: int) -> Tensor:
        """Run the accepted tokens that the cache lacks -> logits `[A, V]` after each row's last token.

        A captured round cannot know how many these are and runs the last `anew` again: as many as a round may add.
        """

    def run(self, batch: Batch, tokens: Tensor, tree: TokenTree | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Run further nodes `tokens [A, n]` -> logits `[A, n, V]`. `tree` has all nodes so far, the root included;
        None: a chain."""

    def end_proposal(self, batch: Batch) -> None:
        """The proposal is complete; the target runs next."""

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Keep at most the first `lengths` tokens of each row."""

    def with_all_pages(self, rows: Sequence[Row]) -> list[int]:
        """The sequences of `rows`, each with pages for all that captured rounds may append."""

    def release(self, rows: Sequence[Row]) -> None:
        """Give the pages of rows that have ended back."""


class DraftSession(Protocol):
    """A drafter at work on one `generate` call."""

    states: Sequence[DraftState]
    # addresses of weights that the session itself reads: a captured round is captured again when they change
    reads: tuple[int, ...]

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """A draft for the rows of `batch`: node 0 of each is its last accepted token. `tree`: the shape wanted; None
        leaves it to the drafter."""

    def min_length(self, tree: TokenTree | None) -> int:
        """Tokens that a row must have before its rounds can be captured."""

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Which nodes of each row of the last proposal stay, from depth 1 on. Not called for rounds without a proposal,
        nor for captured ones."""

    def release(self, rows: Sequence[Row]) -> None:
        """Forget rows that have ended; also called, with all rows left, when the call ends or fails."""


@dataclass(frozen=True, slots=True)
class StatelessSession:
    """A `DraftSession` that keeps nothing between rounds: `propose(batch, tree)` is all there is to it.

    `reads`: see `DraftSession.reads`.
    """

    propose: Callable[[Batch, TokenTree | None], Draft]
    reads: tuple[int, ...] = ()
    states: tuple[DraftState, ...] = ()

    def min_length(self, tree: TokenTree | None) -> int:
        """Any text will do."""
        return 1

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Accepted tokens are in the batch's text."""

    def release(self, rows: Sequence[Row]) -> None:
        """No row holds anything here."""


@runtime_checkable
class Drafter(Protocol):
    """Anything that proposes. `start` of a drafter that keeps nothing between rounds returns a `StatelessSession`."""

    traits: DrafterTraits

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError, naming the values, when this drafter cannot draft for `target`."""

    def start(self, rows: Rows, max_tokens: int) -> DraftSession:
        """Begin to draft for one `generate` call, in which no tree is larger than `max_tokens` nodes without the
        root."""


def is_drafter(given) -> bool:
    """Whether something has the members of a `Drafter`."""
    return not isinstance(given, type) and isinstance(given, Drafter)


def require_drafter(drafter) -> None:
    """Raise TypeError for what is no drafter: a model, say."""
    if not is_drafter(drafter):
        given = drafter if isinstance(drafter, type | str | None) else type(drafter).__name__
        raise TypeError(f"a drafter is wanted, such as specdec.ModelDrafter(model), got {given!r}")
