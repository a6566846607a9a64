"""Tokens of rounds whose trees the drafter grows itself, by the number of their nodes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2

import numpy as np

SIZES = (7, 15, 31, 63, 127, 255)  # of trees that are considered: with the root they fill the tiles of products
START, DOUBLING = 1.0, 0.35  # drafted tokens accepted of one node, and of twice as many nodes beside, to begin with
TRUST = (0.5, 8.0)  # rounds that these guesses count for
FORGET = 0.97


@dataclass(slots=True)
class GrownCounts:
    """A size's rounds tell most of that size, and something of others: tokens rise with the logarithm of the size.

    seen: size -> tokens and rounds, with earlier rounds faded."""

    seen: dict[int, tuple[float, float]] = field(default_factory=dict)

    def observe(self, nodes: int, tokens: float) -> None:
        """Add a round with trees of `nodes` that brought `tokens` a row."""
        before = self.seen.get(nodes, (0.0, 0.0))
        self.seen[nodes] = FORGET * before[0] + tokens, FORGET * before[1] + 1

    def tokens(self, nodes: int) -> float:
        """Expected tokens of a round, the target's own among them."""
        guess, (tokens, rounds) = self._line(nodes), self.seen.get(nodes, (0.0, 0.0))
        return (2 * guess + tokens) / (2 + rounds)

    def _line(self, nodes: int) -> float:
        """What all sizes say of one, by regularised least squares."""
        normal, right = np.diag(TRUST), np.array((TRUST[0] * START, TRUST[1] * DOUBLING))
        for size, (tokens, rounds) in self.seen.items():
            x = np.array((1.0, log2(size)))
            normal = normal + rounds * np.outer(x, x)
            right = right + (tokens - rounds) * x
        start, doubling = np.linalg.solve(normal, right)
        return 1 + max(0.0, float(start + max(0.0, doubling) * log2(nodes)))


def sizes_up_to(largest: int) -> Sequence[int]:
    """The sizes to consider for a drafter whose largest tree has `largest` nodes, in rising order."""
    return [*(size for size in SIZES if size < largest), largest]
