"""Seconds of rounds of each shape on one card, for one number of rows: measured ones, and predictions from them."""

import math
from dataclasses import dataclass, field

import numpy as np

from specdec.planning.policy import PLAIN, Shape

FIXED, NODE = 0.1, 0.0015  # steps that any draft and each of its nodes in a row add, before anything is known
LEVEL_OF_MODEL, LEVEL = 0.1, 0.02  # steps that a level adds, drafted by a model of its own or by heads
TRUST = np.diag((0.1, 0.3, 3.0))  # weight of these guesses in the least squares
STARTS_WITH, AT_MOST = 4, 32  # rounds that a measured time counts for, and all that was observed
REVIEW_AFTER, REVIEW_AT_MOST = 16, 2048  # rounds after which new shapes are considered, twice as many each time


@dataclass(slots=True)
class RoundTimes:
    """What is known of one number of `rows`.

    has_model: whether levels are drafted by a model of its own, step by step.
    known: a shape's name -> (levels, drafted nodes, seconds); trees of one size and depth take the same time.
    refused: drafted nodes from which on shapes cannot be captured, for want of memory, say.
    decoded: seconds of all rounds so far.
    since: rounds since new shapes were considered, after `between` rounds.
    scouted: those of them that ran the scout (see `fitted`).
    """

    rows: int
    has_model: bool
    known: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    refused: float = math.inf
    decoded: float = 0.0
    since: int = REVIEW_AFTER
    between: int = REVIEW_AFTER
    scouted: int = 0
    _rounds: dict[str, int] = field(default_factory=dict)

    @property
    def step(self) -> float | None:
        """Seconds of a plain round; None: not measured yet."""
        return self.known[PLAIN.name][2] if PLAIN.name in self.known else None

    @property
    def review_due(self) -> bool:
        """Whether it is time to consider new shapes."""
        return self.since >= self.between

    def forget_rounds(self) -> None:
        """Consider new shapes as if nothing had been decoded; the times stay."""
        self.decoded, self.since, self.between, self.scouted = 0.0, REVIEW_AFTER, REVIEW_AFTER, 0

    def reviewed(self) -> None:
        """Count from here on."""
        self.since, self.scouted, self.between = 0, 0, min(2 * self.between, REVIEW_AT_MOST)

    def knows(self, shape: Shape) -> bool:
        """Whether rounds of `shape` were measured, or cannot be captured."""
        return shape.name in self.known or self.refuses(shape)

    def measured(self, shape: Shape, seconds: float) -> None:
        """Take a measured time over; infinity: it cannot be captured."""
        if seconds == math.inf:
            self.refused = min(self.refused, shape.tokens)
            return
        self.known[shape.name] = (shape.levels, shape.tokens, seconds)
        self._rounds[shape.name] = STARTS_WITH

    def learn(self, shape: Shape, seconds: float) -> None:
        """Add a round that has run; a time far from the expected one is clipped.

        Of a shape that was not measured the shortest of the first rounds counts."""
        self.decoded += seconds
        self.since += 1
        if shape.name not in self.known:
            self.known[shape.name], self._rounds[shape.name] = (shape.levels, shape.tokens, seconds), 0
        levels, nodes, mean = self.known[shape.name]
        rounds = self._rounds.get(shape.name, STARTS_WITH) + 1
        if rounds <= STARTS_WITH:
            mean = seconds = min(mean, seconds)
        clipped = min(max(seconds, 0.5 * mean), 1.5 * mean)
        self._rounds[shape.name] = rounds
        self.known[shape.name] = levels, nodes, mean + (clipped - mean) / min(rounds, AT_MOST)

    def seconds(self, shape: Shape) -> float:
        """Seconds of a round: as measured, or predicted from measured shapes, those of a similar size above all.

        Raises ValueError while a plain round was not measured."""
        if self.knows(shape):
            return math.inf if self.refuses(shape) else self.known[shape.name][2]
        if self.step is None:
            raise ValueError(f"a plain round of {self.rows} rows was not measured yet")
        levels, nodes = shape.levels, shape.tokens
        return self.step * float(1 + self._added(nodes) @ np.array((1.0, levels, nodes)))

    def seconds_of_node(self, shape: Shape) -> float:
        """Seconds that a further node in every row would add to a round of `shape`."""
        return (self.step or 0.0) * float(self._added(shape.tokens)[2])

    def _added(self, nodes: int) -> np.ndarray:
        """Steps that any draft, a level and a node add, from measured shapes, those of about `nodes` above all."""
        assert self.step is not None
        level = LEVEL_OF_MODEL if self.has_model else LEVEL
        normal, right = TRUST.copy(), TRUST @ np.array((FIXED, level, NODE * self.rows))
        for name, (deep, many, seconds) in self.known.items():
            if name != PLAIN.name:
                x, near = np.array((1.0, deep, many)), 0.25 ** abs(np.log2((many + 1) / (nodes + 1)))
                normal += near * np.outer(x, x)
                right += near * x * (seconds / self.step - 1)
        return np.linalg.solve(normal, right).clip(min=0.0)

    def refuses(self, shape: Shape) -> bool:
        """Whether rounds of `shape` cannot be captured."""
        return shape != PLAIN and shape.tokens >= self.refused
