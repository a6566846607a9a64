"""A warning where a fixed shape of draft makes decoding slower than plain steps are."""

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST_ROUNDS = 32
LEAST_STEP = 1e-3  # seconds of a plain step; what the host does besides, which is not timed, weighs in shorter ones
LOSS = 0.95  # share of plain decoding's speed below which it warns


@dataclass(slots=True)
class LossWatch:
    """What rounds of all rows took and gave, by number of rows, until there are enough of them to judge.

    >>> watch = LossWatch()
    >>> watch.add("a tree of 64 nodes", 16, seconds=[0.0259] * 32, tokens=[2.1] * 32, step=0.006)
    'a tree of 64 nodes at batch 16 takes 25.9 ms a round for 2.1 tokens; plain steps take 6.0 ms each: 0.49x of plain'
    """

    rounds: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    judged: set[int] = field(default_factory=set)

    def add(self, what: str, rows: int, seconds: Sequence[float], tokens: Sequence[float], step: float) -> str | None:
        """Add rounds of `rows` rows, with tokens a row; a sentence if they are slower than `step` a token, the first
        time that there are enough."""
        if rows in self.judged or step < LEAST_STEP:
            return None
        seen = self.rounds.setdefault(rows, [])
        seen += zip(seconds, tokens, strict=True)
        if len(seen) < LEAST_ROUNDS:
            return None
        self.judged.add(rows)
        del self.rounds[rows]
        took, gave = statistics.median(one for one, _ in seen), statistics.fmean(many for _, many in seen)
        share = gave * step / took
        if share >= LOSS:
            return None
        return (
            f"{what} at batch {rows} takes {1000 * took:.1f} ms a round for {gave:.1f} tokens; plain steps take "
            f"{1000 * step:.1f} ms each: {share:.2f}x of plain"
        )


def warn_of_loss(sentence: str, smaller: str) -> None:
    """Warn with the numbers, and say what else to use."""
    warnings.warn(f'{sentence}; use {smaller} or tree="auto"', stacklevel=4)
