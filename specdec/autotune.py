"""What each round proposes: a fixed shape, or the one that has paid best so far.

The automatic policy picks the shape with the most expected tokens a second, from two estimates:

* acceptance (`Counts`): how often the first child was taken, by depth and by whether the round before went smoothly, and the second, third …
  where it was not. A call starts from what was usual in those before and soon goes by its own rounds;
* time, for one machine: a round of depth d with n nodes takes 1 + c d + s (n - 1) steps, a step being the time of a plain round. c and s
  follow from the rounds seen by regularised least squares; a shape that was timed itself goes mostly by that.

While speculation does not pay it steps plainly and tries again after 4, 8, 16 … plain rounds, so a hopeless drafter costs a few percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Protocol

from specdec.theory import expected_tree_tokens
from specdec.tree import TokenTree
from specdec.tree_search import greedy_tree

Ranks = Sequence[tuple[int, int | None]]  # as in RoundStats.ranks: (children, accepted rank) at each node passed


@dataclass(frozen=True, slots=True)
class Shape:
    """What a round proposes: `tree` None leaves it to the drafter."""

    name: str
    tree: TokenTree | None = None


PLAIN, OWN = Shape("plain"), Shape("own")


def shape_of(tree: TokenTree) -> Shape:
    """A tree under the name that the statistics print."""
    if tree.size == 1:
        return PLAIN
    return Shape(f"chain {tree.size - 1}" if tree.is_chain else f"tree {tree.size} x {tree.max_depth}", tree)


class Policy(Protocol):
    """Decides round by round; one object a `generate` call."""

    max_tokens: int  # drafted tokens of its largest shape

    def next(self) -> Shape:
        """The shape of the coming round."""

    def hear(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """What a round of that shape gave: its wall time (None: it holds the prefill), `RoundStats.ranks` of each row, tokens a row."""


@dataclass(slots=True)
class Fixed:
    """Always the same shape."""

    shape: Shape
    max_tokens: int

    def next(self) -> Shape:
        """That shape."""
        return self.shape

    def hear(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """Nothing to learn."""


@dataclass(slots=True)
class Counts:
    """How often children were taken, by what they follow: (taken, offered) pairs.

    `first[smooth][depth]`: first children at depth 1, 2 and below, after a round that was rejected somewhere and after one that was not:
    easy stretches of text last for rounds. `later[rank - 1]`: further children, where the first was rejected.
    """

    first: list[list[tuple[float, float]]] = field(default_factory=lambda: [[(1.2, 2.0)] * 3, [(1.7, 2.0)] * 3])
    later: list[tuple[float, float]] = field(default_factory=lambda: [(1.5, 3.0), (0.6, 3.0), (0.3, 3.0)])

    def faded(self, weight: float) -> "Counts":
        """The same shares as if seen `weight` times at most: a start that new rounds soon outweigh."""
        fade = lambda pairs: [(taken * min(1.0, weight / offered), min(offered, weight)) for taken, offered in pairs]  # noqa: E731
        return Counts([fade(pairs) for pairs in self.first], fade(self.later))

    def hear(self, smooth: bool, ranks: Sequence[Ranks], forget: float) -> None:
        """Add a round, every row of which counts for one part of it, and forget a little of what was before."""
        part = 1 / max(1, len(ranks))
        first, later = ([[forget * x for x in pair] for pair in pairs] for pairs in (self.first[smooth], self.later))
        for passed in ranks:
            for depth, (children, accepted) in enumerate(passed):
                first[min(depth, 2)][0] += part * (accepted == 0)
                first[min(depth, 2)][1] += part
                for rank in range(1, min(children, 4) if accepted != 0 else 0):
                    later[rank - 1][0] += part * (accepted == rank)
                    later[rank - 1][1] += part
        self.first[smooth], self.later = ([tuple(pair) for pair in pairs] for pairs in (first, later))

    def acceptance(self, smooth: bool) -> list[list[float]]:
        """By depth (1, 2, below) and rank, falling and of exclusive events."""
        rows = []
        for hits, trials in self.first[smooth]:
            first = min(hits / trials, 0.98)
            row = [first]
            for taken, offered in self.later:
                row.append(min((1 - first) * taken / offered, row[-1], 1 - sum(row)))
            rows.append(row)
        return rows


@dataclass(slots=True)
class Machine:
    """What a generator learns for batches of one size and keeps from call to call: times of this machine, and what acceptance is usual.

    `step`: seconds of a plain round. `draft` and `node`: what a level and a further node add, in steps. `usual`: of all texts so far.
    """

    step: float | None = None
    draft: float = 0.15
    node: float = 0.03
    timed: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)  # (depth, nodes): rounds, mean steps; (0, 0): the drafter's own shape
    usual: Counts = field(default_factory=Counts)
    _sums: tuple[float, ...] = (0.0,) * 5  # of d d, d n, n n, d y, n y

    def cost(self, shape: Shape) -> float:
        """Expected time of a round, in steps."""
        if shape == PLAIN:
            return 1.0
        depth, nodes = _extent(shape)
        rounds, mean = self.timed.get((depth, nodes), (0, 0.0))
        model = 1.5 if shape.tree is None else 1.0 + self.draft * depth + self.node * nodes
        rounds = min(rounds, 8)
        return (2 * model + rounds * mean) / (2 + rounds)

    def learn(self, shape: Shape, seconds: float) -> None:
        """A round of that shape took so long. Times far above what was expected are cut: other programs cause them."""
        if shape == PLAIN:
            self.step = seconds if self.step is None else self.step + 0.2 * (min(seconds, 2 * self.step) - self.step)
        if shape == PLAIN or self.step is None:
            return
        steps = min(seconds / self.step, 2 * self.cost(shape))
        key = d, n = _extent(shape)
        rounds, mean = self.timed.get(key, (0, 0.0))
        self.timed[key] = (rounds + 1, mean + (steps - mean) / min(rounds + 1, 12))
        if shape.tree is not None:
            y = steps - 1
            self._sums = tuple(0.995 * x + new for x, new in zip(self._sums, (d * d, d * n, n * n, d * y, n * y), strict=True))
            dd, dn, nn, dy, ny = self._sums
            dd, nn, dy, ny = dd + 20, nn + 100, dy + 20 * 0.15, ny + 100 * 0.03  # the prior
            determinant = dd * nn - dn * dn
            self.draft, self.node = max(0.0, (dy * nn - ny * dn) / determinant), max(0.0, (ny * dd - dy * dn) / determinant)


def _extent(shape: Shape) -> tuple[int, int]:
    return (0, 0) if shape.tree is None else (shape.tree.max_depth, shape.tree.size - 1)


class Auto:
    """The automatic policy for a drafter whose `shapes` are "tree", "chain" or "own". See the module's docstring."""

    FORGET = 0.93
    PAYS = 1.0
    FIRST_WAIT, LONGEST_WAIT = 4, 64

    def __init__(self, machine: Machine, shapes: str, max_tokens: int):
        self._machine, self._shapes = machine, shapes
        self.max_tokens = max_tokens if shapes == "own" else max(max_tokens, LENGTHS[-1], TREE_SIZES[-1] - 1 if shapes == "tree" else 0)
        self._counts = machine.usual.faded(4.0)
        self._smooth = False  # whether the last round was not rejected anywhere
        self._own = (2.0, 1.0)  # tokens and rounds of the drafter's own shape
        self._wait, self._plain = self.FIRST_WAIT, 0
        self._best = self._find()

    def next(self) -> Shape:
        """A plain round where the step's time is not known yet, then whatever promises most; now and then a look at whether drafting pays by now."""
        shape, gain = self._best
        if self._machine.step is None:
            return PLAIN
        if gain > self.PAYS:
            return shape
        if self._plain >= self._wait:  # a look, at least cost
            return OWN if self._shapes == "own" else shape_of(TokenTree.chain(1))
        return PLAIN

    def hear(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """Learn from a round."""
        if seconds is not None:
            self._machine.learn(shape, seconds)
        if shape == PLAIN:
            self._plain += 1
            return
        if shape.tree is None:
            self._own = (0.9 * self._own[0] + tokens, 0.9 * self._own[1] + 1)
        else:
            self._hear_ranks(ranks)
        self._best = self._find()
        if self._best[1] > self.PAYS:
            self._wait = self.FIRST_WAIT
        elif self._plain:  # a look that found nothing
            self._wait = min(2 * self._wait, self.LONGEST_WAIT)
        self._plain = 0

    def _hear_ranks(self, ranks: Sequence[Ranks]) -> None:
        for counts, forget in ((self._counts, self.FORGET), (self._machine.usual, 0.99)):
            counts.hear(self._smooth, ranks, forget)
        self._smooth = 2 * sum(bool(passed) and passed[-1][1] is not None for passed in ranks) > len(ranks)

    def _find(self) -> tuple[Shape, float]:
        """The shape with the most tokens a step, and how many."""
        if self._shapes == "own":
            return OWN, self._own[0] / self._own[1] / self._machine.cost(OWN)
        rows = self._counts.acceptance(self._smooth)
        tokens, reached, best = 1.0, 1.0, (PLAIN, 1.0)
        for length in range(1, LENGTHS[-1] + 1):
            reached *= rows[min(length, 3) - 1][0]
            tokens += reached
            if length in LENGTHS:
                shape = chain_shape(length)
                best = max(best, (shape, tokens / self._machine.cost(shape)), key=lambda pair: pair[1])
        if self._shapes == "tree":
            for shape, tokens in tree_shapes(tuple(tuple(round(20 * p) for p in row) for row in rows)):
                best = max(best, (shape, tokens / self._machine.cost(shape)), key=lambda pair: pair[1])
        return best


LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
TREE_SIZES, TREE_DEPTHS = (4, 8, 12, 16, 24, 32), (2, 3, 4, 6)


@cache
def chain_shape(length: int) -> Shape:
    """The chain of that many drafted tokens."""
    return shape_of(TokenTree.chain(length))


@lru_cache(maxsize=4096)
def tree_shapes(twentieths: tuple[tuple[int, ...], ...]) -> tuple[tuple[Shape, float], ...]:
    """The trees that the automatic policy weighs, with their expected tokens, for acceptance in steps of 1 / 20: hardly worse, and found at once."""
    rows = [[n / 20 for n in row] for row in twentieths]
    rows = [[p / max(1.0, sum(row)) for p in row] for row in rows]
    grown = [greedy_tree([*rows[:2], *[rows[2]] * 6][:depth], size) for size in TREE_SIZES for depth in TREE_DEPTHS]
    return tuple((shape_of(tree), expected_tree_tokens(tree, rows)) for tree in dict.fromkeys(grown) if tree.size > 1 and not tree.is_chain)
