"""What each round proposes: a fixed shape, or the one that has paid best so far.

The automatic policy picks the shape with the most expected tokens a second, from two estimates:

* acceptance (`AcceptanceEstimate`): how often the first child was taken, by depth and by whether the round before went
  smoothly,
  and the second, third …
  where it was not. A call starts from what was usual in those before and soon goes by its own rounds;
* time, for one machine: a round of depth d with n drafted nodes takes 1 + o + c d + s n steps, a step being the time of
  a plain round. o, c, s
  follow from the rounds seen by regularised least squares; a shape that was timed itself goes mostly by that.

While speculation does not pay it steps plainly and tries again after 8, 16, 32 … plain rounds, so a hopeless drafter
costs a few percent."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from specdec.planning.policy import DRAFTERS_OWN, PLAIN, Ranks, Shape, shape_of
from specdec.planning.tree_search import grow
from specdec.trees.tree import TokenTree


@dataclass(slots=True)
class AcceptanceEstimate:
    """How often children were taken, by what they follow: (taken, offered) pairs.

    `first[smooth][depth]`: first children at depth 1, 2 and below, after a round that was rejected somewhere and after
    one that was not: easy stretches of text last for rounds. `later[rank - 1]`: further children, where the first was
    rejected."""

    first: list[list[tuple[float, float]]] = field(default_factory=lambda: [[(1.2, 2.0)] * 3, [(1.7, 2.0)] * 3])
    later: list[tuple[float, float]] = field(default_factory=lambda: [(1.5, 3.0), (0.6, 3.0), (0.3, 3.0)])

    def faded(self, weight: float) -> "AcceptanceEstimate":
        """The same shares as if seen `weight` times at most: a start that new rounds soon outweigh."""
        fade = lambda pairs: [(taken * min(1.0, weight / offered), min(offered, weight)) for taken, offered in pairs]
        return AcceptanceEstimate([fade(pairs) for pairs in self.first], fade(self.later))

    def observe(self, smooth: bool, ranks: Sequence[Ranks], forget: float) -> None:
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
class CostModel:
    """What a generator learns for batches of one size and keeps from call to call: times of this machine, and what
    acceptance is usual.

    `step`: seconds of a plain round. `fixed`, `draft` and `node`: what drafting at all, a level and a node add to it,
    in steps. `usual`: of all texts so far. `wait`: plain rounds between two looks, as the last call left it."""

    step: float | None = None
    fixed: float = 0.2
    draft: float = 0.15
    node: float = 0.03
    timed: dict[tuple[int, int], tuple[int, float]] = field(
        default_factory=dict
    )  # (depth, nodes): rounds, mean steps; (0, 0): the drafter's own shape
    usual: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    wait: int = 0
    _normal: np.ndarray = field(
        default_factory=lambda: np.diag((2.0, 20.0, 100.0))
    )  # the normal equations, with the weight of the start
    _right: np.ndarray = field(default_factory=lambda: np.array((2.0 * 0.2, 20.0 * 0.15, 100.0 * 0.03)))

    def cost(self, depth: int, nodes: int) -> float:
        """Expected time, in steps, of a round that drafts `nodes` nodes of depth up to `depth`; (0, 0) is the drafter's
        own shape.
        """
        rounds, mean = self.timed.get((depth, nodes), (0, 0.0))
        model = 1.0 + self.fixed + self.draft * depth + self.node * nodes if nodes else 1.5
        rounds = min(rounds, 8)
        return (2 * model + rounds * mean) / (2 + rounds)

    def learn(self, shape: Shape, seconds: float) -> None:
        """A round of that shape took so long. Times far above what was expected are cut: other programs cause them."""
        if shape == PLAIN:
            self.step = seconds if self.step is None else self.step + 0.2 * (min(seconds, 2 * self.step) - self.step)
        if shape == PLAIN or self.step is None:
            return
        key = d, n = (0, 0) if shape.tree is None else (shape.tree.max_depth, shape.tree.size - 1)
        steps = min(seconds / self.step, 2 * self.cost(d, n))
        rounds, mean = self.timed.get(key, (0, 0.0))
        self.timed[key] = (rounds + 1, mean + (steps - mean) / min(rounds + 1, 12))
        if shape.tree is not None:
            x = np.array((1.0, d, n))
            self._normal = 0.997 * self._normal + np.outer(x, x)
            self._right = 0.997 * self._right + x * (steps - 1)
            self.fixed, self.draft, self.node = np.linalg.solve(self._normal, self._right).clip(min=0.0).tolist()


class AdaptivePolicy:
    """The automatic policy for a drafter whose `shapes` are "tree", "chain" or "own". See the module's docstring."""

    FORGET, WEIGHT = 0.9, 16.0
    PAYS = 1.0
    FIRST_WAIT, LONGEST_WAIT = 8, 64

    def __init__(self, machine: CostModel, shapes: str, max_tokens: int, max_depth: int | None = None):
        self._machine, self._shapes = machine, shapes
        self._deepest = LENGTHS[-1] if max_depth is None else max_depth
        self.max_tokens = (
            max_tokens
            if shapes == "own"
            else max(max_tokens, LENGTHS[-1], TREE_SIZES[-1] - 1 if shapes == "tree" else 0)
        )
        self._counts = machine.usual.faded(self.WEIGHT)
        self._smooth = False  # whether the last round was not rejected anywhere
        self._own = (2.0, 1.0)  # tokens and rounds of the drafter's own shape
        self._wait, self._plain = max(self.FIRST_WAIT, machine.wait // 2), 0
        self._best = self._find()

    @property
    def step_seconds(self) -> float | None:
        """What the machine's plain rounds took so far."""
        return self._machine.step

    def next(self) -> Shape:
        """A plain round where the step's time is not known yet, then whatever promises most; now and then a look at
        whether drafting pays by now.
        """
        shape, gain = self._best
        if self._machine.step is None:
            return PLAIN
        if gain > self.PAYS:
            return shape
        if self._plain >= self._wait:  # a look, at least cost
            return DRAFTERS_OWN if self._shapes == "own" else shape_of(TokenTree.chain(1))
        return PLAIN

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
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
        self._machine.wait, self._plain = self._wait, 0

    def _hear_ranks(self, ranks: Sequence[Ranks]) -> None:
        for counts, forget in ((self._counts, self.FORGET), (self._machine.usual, 0.99)):
            counts.observe(self._smooth, ranks, forget)
        self._smooth = 2 * sum(bool(passed) and passed[-1][1] is not None for passed in ranks) > len(ranks)

    def _find(self) -> tuple[Shape, float]:
        """The shape with the most tokens a step, and how many."""
        cost = self._machine.cost
        if self._shapes == "own":
            return DRAFTERS_OWN, self._own[0] / self._own[1] / cost(0, 0)
        rows = self._counts.acceptance(self._smooth)
        tokens, reached, best, paths = 1.0, 1.0, 1.0, ()
        for length in range(1, min(LENGTHS[-1], self._deepest) + 1):
            reached *= rows[min(length, 3) - 1][0]
            tokens += reached
            if length in LENGTHS and tokens / cost(length, length) > best:
                best, paths = tokens / cost(length, length), tuple((0,) * n for n in range(1, length + 1))
        tenths = tuple(tuple(round(10 * p) for p in row) for row in rows)
        for limit in TREE_DEPTHS if self._shapes == "tree" else ():
            grown = grown_paths(tenths, min(limit, self._deepest))
            values, tokens, depth = {(): 1.0}, 1.0, 0
            for count, path in enumerate(grown, 1):
                values[path] = values[path[:-1]] * rows[min(len(path), 3) - 1][path[-1]]
                tokens, depth = tokens + values[path], max(depth, len(path))
                if count + 1 in TREE_SIZES and tokens / cost(depth, count) > best:
                    best, paths = tokens / cost(depth, count), grown[:count]
        return shape_from(paths), best


LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
TREE_SIZES, TREE_DEPTHS = (4, 8, 12, 16, 24, 32), (2, 3, 4, 6)


@lru_cache(maxsize=4096)
def grown_paths(tenths: tuple[tuple[int, ...], ...], depth: int) -> tuple[tuple[int, ...], ...]:
    """The paths of a greedy tree for acceptance at depth 1, 2 and below, in steps of 1 / 10: topology hardly needs
    more, and few are distinct.
    """
    rows = [[max(n, 0.3) / 10 for n in row] for row in tenths]
    return tuple(grow([*rows[:2], *[rows[2]] * depth][:depth], TREE_SIZES[-1] - 1))


@lru_cache(maxsize=1024)
def shape_from(paths: tuple[tuple[int, ...], ...]) -> Shape:
    """The shape of a tree given by its paths of ranks."""
    return shape_of(TokenTree.from_choices(paths))
