"""What a policy of drafts is, and the one that always asks for the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.trees.tree import TokenTree

Ranks = Sequence[tuple[int, int | None]]  # as in RoundStats.ranks: (children, accepted rank) at each node passed


@dataclass(frozen=True, slots=True)
class Shape:
    """What a round proposes: `tree` None leaves it to the drafter."""

    name: str
    tree: TokenTree | None = None


PLAIN, DRAFTERS_OWN = Shape("plain"), Shape("own")


def shape_of(tree: TokenTree) -> Shape:
    """A tree under the name that the statistics print."""
    if tree.size == 1:
        return PLAIN
    return Shape(f"chain {tree.size - 1}" if tree.is_chain else f"tree {tree.size} x {tree.max_depth}", tree)


class Policy(Protocol):
    """Decides round by round; one object a `generate` call."""

    max_tokens: int  # drafted tokens of its largest shape
    step_seconds: float | None  # a plain round's time, where it is known

    def next(self) -> Shape:
        """The shape of the coming round."""

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """What a round of that shape gave: its wall time (None: it holds the prefill), `RoundStats.ranks` of each row,
        tokens a row.
        """


@dataclass(slots=True)
class FixedPolicy:
    """Always the same shape."""

    shape: Shape
    max_tokens: int
    step_seconds: float | None = None

    def next(self) -> Shape:
        """That shape."""
        return self.shape

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """Nothing to learn."""
