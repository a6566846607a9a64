"""What each round proposes: a fixed shape, or the one that has paid best so far.

The automatic policy keeps, for one `generate` call, two estimates and picks the shape with the most expected tokens a second:

* acceptance by rank, a share with prior counts that forgets slowly: of the nodes passed that had a child of rank r, how often it was taken;
* time: a round of depth d with n nodes takes step + c d + s (n - 1), where the step is the time of a plain round and c and s follow from
  the rounds seen, by regularised least squares.

While speculation does not pay it steps plainly and tries again after 8, 16, 32 … plain rounds, so a hopeless drafter costs a few percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
class Machine:
    """Times of this machine for batches of one size, learned from rounds and kept by the generator from call to call.

    `step`: seconds of a plain round. `draft` and `node`: what a level and a further node add, in steps.
    """

    step: float | None = None
    draft: float = 0.15
    node: float = 0.02
    own: float | None = None  # a round of the drafter's own shape, in steps
    _a: list[float] = field(default_factory=lambda: [40.0, 0.0, 200.0])  # the normal equations' matrix (dd, dn, nn), with the prior's weight
    _b: list[float] = field(default_factory=lambda: [40.0 * 0.15, 200.0 * 0.02])

    def cost(self, shape: Shape) -> float:
        """Expected time of a round, in steps."""
        if shape == PLAIN:
            return 1.0
        if shape.tree is None:
            return self.own or 1.5
        return 1.0 + self.draft * shape.tree.max_depth + self.node * (shape.tree.size - 1)

    def learn(self, shape: Shape, seconds: float) -> None:
        """A round of that shape took so long. Times far above what was expected are held to three times that: other programs cause them."""
        if shape == PLAIN:
            self.step = seconds if self.step is None else self.step + 0.2 * (min(seconds, 3 * self.step) - self.step)
            return
        if self.step is None:
            return
        steps = min(seconds / self.step, 3 * self.cost(shape) + 1)
        if shape.tree is None:
            self.own = steps if self.own is None else self.own + 0.2 * (steps - self.own)
            return
        d, n, y = shape.tree.max_depth, shape.tree.size - 1, steps - 1
        self._a = [0.97 * a + x for a, x in zip(self._a, (d * d, d * n, n * n), strict=True)]
        self._b = [0.97 * b + x for b, x in zip(self._b, (d * y, n * y), strict=True)]
        (dd, dn, nn), (dy, ny) = self._a, self._b
        determinant = dd * nn - dn * dn
        if determinant > 1e-6 * dd * nn:
            self.draft, self.node = max(0.0, (dy * nn - ny * dn) / determinant), max(0.0, (ny * dd - dy * dn) / determinant)
        else:  # chains only: a level and its node cannot be told apart
            both = (dy + ny) / (dd + 2 * dn + nn)
            self.draft, self.node = max(0.0, both * 0.8), max(0.0, both * 0.2)


class Auto:
    """The automatic policy for a drafter whose `shapes` are "tree", "chain" or "own". See the module's docstring."""

    RANKS = 4
    FORGET = 0.985
    PAYS = 1.02
    FIRST_WAIT, LONGEST_WAIT = 8, 64

    def __init__(self, machine: Machine, shapes: str, max_tokens: int):
        self._machine, self._shapes = machine, shapes
        self.max_tokens = max_tokens if shapes == "own" else max(max_tokens, LENGTHS[-1], TREE_SIZES[-1] - 1 if shapes == "tree" else 0)
        self._taken = [2.1, 0.45, 0.15, 0.06]  # prior: three nodes' worth of a middling drafter
        self._offered = [3.0] * self.RANKS
        self._own_tokens, self._wait, self._plain = 2.0, self.FIRST_WAIT, 0
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
            self._own_tokens += 0.15 * (tokens - self._own_tokens)
        else:
            self._taken = [self.FORGET * x for x in self._taken]
            self._offered = [self.FORGET * x for x in self._offered]
            for children, accepted in (passed for row in ranks for passed in row):
                for rank in range(min(children, self.RANKS)):
                    self._offered[rank] += 1
                    self._taken[rank] += accepted == rank
        self._best = self._find()
        if self._best[1] > self.PAYS:
            self._wait = self.FIRST_WAIT
        elif self._plain:  # a look that found nothing
            self._wait = min(2 * self._wait, self.LONGEST_WAIT)
        self._plain = 0

    def _find(self) -> tuple[Shape, float]:
        """The shape with the most tokens a step, and how many."""
        if self._shapes == "own":
            return OWN, self._own_tokens / self._machine.cost(OWN)
        found = ((shape, tokens / self._machine.cost(shape)) for shape, tokens in candidates(self._acceptance(), self._shapes == "tree"))
        return max(found, key=lambda pair: pair[1])

    def _acceptance(self) -> tuple[float, ...]:
        """By rank, falling and of exclusive events, in steps of 1 / 20: a tree is hardly worse for it and need not be searched for again."""
        steps, left = [], 20
        for taken, offered in zip(self._taken, self._offered, strict=True):
            steps.append(min(round(20 * taken / offered), left, steps[-1] if steps else 20))
            left -= steps[-1]
        return tuple(n / 20 for n in steps)


LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
TREE_SIZES = (4, 6, 8, 12, 16, 24, 32)


@lru_cache(maxsize=4096)
def candidates(acceptance: tuple[float, ...], trees: bool) -> tuple[tuple[Shape, float], ...]:
    """The shapes that the automatic policy weighs, with their expected tokens a round."""
    found = [TokenTree.chain(length) for length in LENGTHS]
    if trees:
        found += [greedy_tree([acceptance] * depth, size) for size in TREE_SIZES for depth in (2, 4, 6) if depth + 1 < size]
    return tuple((shape_of(tree), expected_tree_tokens(tree, [acceptance])) for tree in dict.fromkeys(found) if tree.size > 1)
