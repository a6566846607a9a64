"""What each round drafts: the shape with the most expected tokens per second, from two estimates.

* Acceptance (`AcceptanceEstimate`): how often the first child was accepted, by depth and by whether the previous round
  was accepted without a rejection, and how often the second, third … child was accepted after that. A call starts from
  the shares of earlier calls, which its own rounds soon outweigh.
* Time (`CostModel`), for one machine: a round of depth d with n drafted nodes takes 1 + o + c d + s n steps, where a
  step is the time of a plain round. o, c and s come from regularised least squares over past rounds; a shape that has
  been timed itself mostly uses that time.

While speculation does not pay, rounds are plain and drafting is retried after 8, 16, 32 … of them, so that a useless
drafter costs a few percent."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from specdec.planning.candidates import LONG_LENGTHS
from specdec.planning.grown_counts import GrownCounts, sizes_up_to
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, Place, Ranks, Shape, grown_shape, shape_of
from specdec.planning.tree_search import Path, grow
from specdec.trees.tree import TokenTree

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)  # of chains that are considered
FEW_LENGTHS = (1, 2, 3, 5, 8)  # where each shape is captured first, which costs as much as dozens of rounds
TREE_SIZES, TREE_DEPTHS = (4, 8, 12, 16, 24, 32), (2, 3, 4, 6)  # of trees that are considered
# further ones where a pass costs the same for one token or hundreds, since its weights cross a bus
LARGE_SIZES, LARGE_DEPTHS = (48, 64, 96, 128), (8, 12, 16)  # and LONG_LENGTHS


@dataclass(slots=True)
class AcceptanceEstimate:
    """How often children were accepted, as (accepted, offered) pairs.

    first: `first[smooth][depth]`, first children at depth 1, 2 and deeper, after a round with a rejection and after one
        without (easy stretches of text last for several rounds).
    later: `later[rank - 1]`, further children, where the first was rejected.
    """

    first: list[list[tuple[float, float]]] = field(default_factory=lambda: [[(1.2, 2.0)] * 3, [(1.7, 2.0)] * 3])
    later: list[tuple[float, float]] = field(default_factory=lambda: [(1.5, 3.0), (0.6, 3.0), (0.3, 3.0)])

    def faded(self, weight: float) -> "AcceptanceEstimate":
        """The same shares with at most `weight` observations each, so that new rounds soon outweigh them."""
        fade = lambda pairs: [(taken * min(1.0, weight / offered), min(offered, weight)) for taken, offered in pairs]
        return AcceptanceEstimate([fade(pairs) for pairs in self.first], fade(self.later))

    def observe(self, smooth: bool, ranks: Sequence[Ranks], forget: float) -> None:
        """Add a round, whose rows share a total weight of 1, after multiplying all earlier counts by `forget`."""
        part = 1 / max(1, len(ranks))
        first, later = ([[forget * a, forget * b] for a, b in pairs] for pairs in (self.first[smooth], self.later))
        for passed in ranks:
            for depth, (children, accepted) in enumerate(passed):
                first[min(depth, 2)][0] += part * (accepted == 0)
                first[min(depth, 2)][1] += part
                for rank in range(1, min(children, 4) if accepted != 0 else 0):
                    later[rank - 1][0] += part * (accepted == rank)
                    later[rank - 1][1] += part
        self.first[smooth], self.later = ([(a, b) for a, b in pairs] for pairs in (first, later))

    def acceptance(self, smooth: bool) -> list[list[float]]:
        """Acceptance by depth (1, 2, deeper) and rank: probabilities of exclusive events that fall with the rank."""
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
    """What a generator learns for one batch size and keeps between calls: round times and the usual acceptance.

    step: seconds of a plain round.
    fixed, draft, node: steps added by any draft, by each level and by each node.
    timed: (depth, nodes) -> number of rounds and their mean time in steps; (0, 0) is the drafter's own shape, (0, n) a
        tree of n nodes that it grows.
    grown: tokens of such trees.
    usual: acceptance over all texts so far.
    wait: plain rounds before drafting is retried, as the last call left it.
    """

    step: float | None = None
    fixed: float = 0.2
    draft: float = 0.15
    node: float = 0.03
    timed: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    usual: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    grown: GrownCounts = field(default_factory=GrownCounts)
    wait: int = 0
    # normal equations of the least squares, with the weights of the initial values
    _normal: np.ndarray = field(default_factory=lambda: np.diag((2.0, 20.0, 100.0)))
    _right: np.ndarray = field(default_factory=lambda: np.array((2.0 * 0.2, 20.0 * 0.15, 100.0 * 0.03)))

    def forget_texts(self) -> None:
        """Drop what texts have taught; the times of rounds stay."""
        self.usual, self.grown, self.wait = AcceptanceEstimate(), GrownCounts(), 0

    def cost(self, depth: int, nodes: int) -> float:
        """Expected time, in steps, of a round with `nodes` drafted nodes on `depth` levels; see `timed` for (0, 0)."""
        rounds, mean = self.timed.get((depth, nodes), (0, 0.0))
        model = 1.0 + self.fixed + self.draft * depth + self.node * nodes if nodes else 1.5
        rounds = min(rounds, 8)
        return (2 * model + rounds * mean) / (2 + rounds)

    def learn(self, shape: Shape, seconds: float) -> None:
        """Add the time of a round. Times far above the expected one, which other programs cause, are clipped."""
        if shape == PLAIN:
            self.step = seconds if self.step is None else self.step + 0.2 * (min(seconds, 2 * self.step) - self.step)
        if shape == PLAIN or self.step is None:
            return
        key = d, n = shape.levels, shape.tokens
        steps = min(seconds / self.step, 2 * self.cost(d, n))
        rounds, mean = self.timed.get(key, (0, 0.0))
        self.timed[key] = (rounds + 1, mean + (steps - mean) / min(rounds + 1, 12))
        if n:
            x = np.array((1.0, d, n))
            self._normal = 0.997 * self._normal + np.outer(x, x)
            self._right = 0.997 * self._right + x * (steps - 1)
            self.fixed, self.draft, self.node = _not_negative(self._normal, self._right).tolist()


def _not_negative(normal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The solution of normal equations, with terms that would be negative left out one after the other.

    Cutting off a negative term alone would leave its share in the others: of nodes that cost nothing, in the levels."""
    found, kept = np.zeros(len(right)), list(range(len(right)))
    while kept:
        solved = np.linalg.solve(normal[np.ix_(kept, kept)], right[kept])
        if solved.min() >= 0:
            found[kept] = solved
            break
        kept.pop(int(solved.argmin()))
    return found


class AdaptivePolicy:
    """Chooses the shape of each round for a drafter whose `shapes` are as in `DrafterTraits`; see the module.

    few_shapes: consider chains of FEW_LENGTHS alone, so that rounds can be captured: for a CPU, which verifies no large
        tree fast enough.
    most: tokens that a row may draft where passes cost the same for one or hundreds: longer chains and larger trees are
        considered up to there (0: they are not)."""

    FORGET, WEIGHT = 0.9, 16.0  # of an `AcceptanceEstimate`: see `observe` and `faded`
    PAYS = 1.0  # expected tokens per step above which drafting pays
    FIRST_WAIT, LONGEST_WAIT = 8, 64  # plain rounds before drafting is retried

    def __init__(self, machine: CostModel, shapes: str, max_tokens: int, max_depth: int | None = None,
                 few_shapes: bool = False, most: int = 0):  # fmt: skip
        self._machine, self.few_shapes = machine, few_shapes
        self._shapes = "chain" if few_shapes and shapes == "tree" else shapes
        self._lengths = FEW_LENGTHS if few_shapes else (*LENGTHS, *(n for n in LONG_LENGTHS if n <= most))
        self._sizes = *TREE_SIZES, *(size for size in LARGE_SIZES if size <= most)
        self._depths = TREE_DEPTHS if self._sizes == TREE_SIZES else (*TREE_DEPTHS, *LARGE_DEPTHS)
        self._deepest = self._lengths[-1] if max_depth is None else max_depth
        largest = {"own": 0, "grown": 0, "chain": self._lengths[-1]}.get(self._shapes, self._sizes[-1] - 1)
        self._grown = [grown_shape(size) for size in (sizes_up_to(max_tokens) if shapes == "grown" else ())]
        self.max_tokens = max(max_tokens, largest)
        self._acceptance = machine.usual.faded(self.WEIGHT)
        self._smooth = False  # whether most rows of the last round had no rejection
        self._own = (2.0, 1.0)  # tokens and rounds of the drafter's own shape, with earlier rounds faded
        self._wait, self._plain = max(self.FIRST_WAIT, machine.wait // 2), 0
        self._best = self._find()

    @property
    def step_seconds(self) -> float | None:
        """The time of a plain round; None: not measured yet."""
        return self._machine.step

    def next(self) -> Shape:
        """The shape with the highest expected speed.

        The first round is plain if the time of a step is not known. While drafting does not pay, rounds are plain and
        drafting is retried periodically."""
        shape, gain = self._best
        if self._machine.step is None:
            return PLAIN
        if gain > self.PAYS:
            return shape
        if self._plain >= self._wait:
            return self._cheapest()
        return PLAIN

    def _cheapest(self) -> Shape:
        """What a retry drafts."""
        if self._grown:
            return self._grown[0]
        return DRAFTERS_OWN if self._shapes == "own" else shape_of(TokenTree.chain(1))

    def enter(self, place: Place) -> None:
        """Do nothing: times come from the rounds themselves."""

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """See `Policy.observe`."""
        if seconds is not None:
            self._machine.learn(shape, seconds)
        if shape == PLAIN:
            self._plain += 1
            return
        if shape.nodes:
            self._machine.grown.observe(shape.nodes, tokens)
        elif shape.tree is None:
            self._own = (0.9 * self._own[0] + tokens, 0.9 * self._own[1] + 1)
        else:
            self._observe_ranks(ranks)
        self._best = self._find()
        if self._best[1] > self.PAYS:
            self._wait = self.FIRST_WAIT
        elif self._plain:  # a retry that did not pay
            self._wait = min(2 * self._wait, self.LONGEST_WAIT)
        self._machine.wait, self._plain = self._wait, 0

    def finish(self, rounds: Sequence[int], tokens: Sequence[int]) -> None:
        """Do nothing: each round runs the rows that are left."""

    def _observe_ranks(self, ranks: Sequence[Ranks]) -> None:
        for acceptance, forget in ((self._acceptance, self.FORGET), (self._machine.usual, 0.99)):
            acceptance.observe(self._smooth, ranks, forget)
        self._smooth = 2 * sum(bool(passed) and passed[-1][1] is not None for passed in ranks) > len(ranks)

    def _find(self) -> tuple[Shape, float]:
        """The shape with the most expected tokens per step, and that number."""
        cost = self._machine.cost
        if self._shapes == "own":
            return DRAFTERS_OWN, self._own[0] / self._own[1] / cost(0, 0)
        if self._grown:
            speeds = {one: self._machine.grown.tokens(one.tokens) / cost(0, one.tokens) for one in self._grown}
            return max(speeds.items(), key=lambda item: item[1])
        rows = self._acceptance.acceptance(self._smooth)
        tokens, reached, best = 1.0, 1.0, 1.0
        paths: tuple[Path, ...] = ()
        for length in range(1, min(self._lengths[-1], self._deepest) + 1):
            reached *= rows[min(length, 3) - 1][0]
            tokens += reached
            if length in self._lengths and tokens / cost(length, length) > best:
                best, paths = tokens / cost(length, length), tuple((0,) * n for n in range(1, length + 1))
        tenths = tuple(tuple(round(10 * p) for p in row) for row in rows)
        for limit in self._depths if self._shapes == "tree" else ():
            grown = grown_paths(tenths, min(limit, self._deepest), self._sizes[-1])
            values: dict[Path, float] = {(): 1.0}
            tokens, depth = 1.0, 0
            for count, path in enumerate(grown, 1):
                values[path] = values[path[:-1]] * rows[min(len(path), 3) - 1][path[-1]]
                tokens, depth = tokens + values[path], max(depth, len(path))
                if count + 1 in self._sizes and tokens / cost(depth, count) > best:
                    best, paths = tokens / cost(depth, count), grown[:count]
        return shape_from(paths), best


@lru_cache(maxsize=4096)
def grown_paths(tenths: tuple[tuple[int, ...], ...], depth: int, size: int = TREE_SIZES[-1]) -> tuple[Path, ...]:
    """The paths of a greedy tree of `size` nodes for acceptances, in tenths, at depth 1, 2 and deeper.

    Tenths are precise enough for a topology, and few combinations of them occur, so results are cached."""
    rows = [[max(n, 0.3) / 10 for n in row] for row in tenths]
    return tuple(grow([*rows[:2], *[rows[2]] * depth][:depth], size - 1))


@lru_cache(maxsize=1024)
def shape_from(paths: tuple[Path, ...]) -> Shape:
    """The shape of the tree with these paths."""
    return shape_of(TokenTree.from_choices(paths))
