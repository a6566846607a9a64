"""Policies choose the shape of each round's draft; the fixed policy always chooses the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.trees.tree import TokenTree

Ranks = Sequence[tuple[int, int | None]]  # as in RoundStats.ranks: (children, accepted rank) at each node passed


@dataclass(frozen=True, slots=True)
class Shape:
    """The draft of a round: `tree`, or the drafter's own choice where that is None, of so many `nodes` (None: its own).

    nodes: without the root, of trees that the drafter grows."""

    name: str
    tree: TokenTree | None = None
    nodes: int | None = None

    @property
    def tokens(self) -> int:
        """Drafted ones; 0 where the drafter decides."""
        return self.nodes or 0 if self.tree is None else self.tree.size - 1

    @property
    def levels(self) -> int:
        """Those of `tree`; 0 where the drafter decides."""
        return 0 if self.tree is None else self.tree.max_depth


PLAIN, DRAFTERS_OWN = Shape("plain"), Shape("own")


def grown_shape(nodes: int) -> Shape:
    """The shape of trees of `nodes` that the drafter grows."""
    return Shape(f"grown {nodes}", None, nodes)


def shape_of(tree: TokenTree) -> Shape:
    """The shape of `tree`, with the name that statistics print."""
    if tree.size == 1:
        return PLAIN
    return Shape(f"chain {tree.size - 1}" if tree.is_chain else f"tree {tree.size} x {tree.max_depth}", tree)


@dataclass(frozen=True, slots=True)
class Place:
    """Where captured rounds run, for a policy that chooses by what is captured there.

    rows: in one round, empty slots included.
    left: tokens that the row with the most of them may still get.
    captured: whether a round of a shape is captured.
    seconds: captures a round of a shape and measures it, by replays that change no row; infinity: it cannot be.
    measures: whether `seconds` can be asked, and is worth its time; else rounds tell how long they take.
    """

    rows: int
    left: Callable[[], int]
    captured: Callable[[Shape], bool]
    seconds: Callable[[Shape], float]
    measures: bool = True


class Policy(Protocol):
    """Chooses the shape of each round; a new object for each `generate` call."""

    max_tokens: int  # drafted tokens in its largest shape
    few_shapes: bool  # whether it uses so few shapes that a round of each can be captured

    @property
    def step_seconds(self) -> float | None:
        """Time of a plain round; None: unknown."""

    def next(self) -> Shape:
        """The shape of the next round; it may be asked more than once before that."""

    def enter(self, place: Place) -> None:
        """Called before captured rounds begin at `place`, and again after every pause in which none is in flight."""

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """Learn from a finished round of `shape`.

        seconds: its wall time (None: it includes the prefill).
        ranks: `RoundStats.ranks` of each row.
        tokens: mean number of new tokens a row.
        """

    def finish(self, rounds: Sequence[int], tokens: Sequence[int]) -> None:
        """Called at the end of a call with each row's number of rounds and of new tokens; not if the call failed."""


@dataclass(slots=True)
class FixedPolicy:
    """Always the same shape."""

    shape: Shape
    max_tokens: int
    step_seconds: float | None = None
    few_shapes: bool = True

    def next(self) -> Shape:
        """`shape`."""
        return self.shape

    def enter(self, place: Place) -> None:
        """Do nothing."""

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """Do nothing."""

    def finish(self, rounds: Sequence[int], tokens: Sequence[int]) -> None:
        """Do nothing."""


@dataclass(slots=True)
class ReplayPolicy:
    """The shapes that the rounds of a text had before, one after the other, then plain rounds."""

    shapes: Sequence[Shape]
    max_tokens: int
    step_seconds: float | None = None
    few_shapes: bool = False
    _rounds: int = 0

    def next(self) -> Shape:
        """The next of `shapes`."""
        return self.shapes[self._rounds] if self._rounds < len(self.shapes) else PLAIN

    def enter(self, place: Place) -> None:
        """Do nothing."""

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """Go on to the next shape."""
        self._rounds += 1

    def finish(self, rounds: Sequence[int], tokens: Sequence[int]) -> None:
        """Do nothing."""
