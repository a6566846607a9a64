"""What a generation did, round by round, and every metric that a paper would print, under one name each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt


@dataclass(frozen=True, slots=True)
class RoundStats:
    """Rounds of one row, or of several rows pooled. One entry a round in each tuple, except that `seconds` lacks a
    row's first round.

    `proposed`: drafted tokens that could count, all nodes of a tree down to the row's end; `accepted`: those that were
    kept; `emitted`: tokens added, the target's own included; `seconds`: wall time of every round after the first, which
    runs the prompt too; all rows of a batch share it. `step_seconds`: one plain step of the target on a batch of this
    size, or None where it was not measured. `depths`: how many drafted tokens in a row could count, which for a chain
    is `proposed`. `ranks`: at each node that was passed, the root included, the (number of children, rank of the
    accepted one or None). `shapes`: what was asked for: "plain", "own", "chain 4" or "tree 16 x 5"."""

    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    emitted: tuple[int, ...]
    seconds: tuple[float, ...]
    step_seconds: float | None = None
    depths: tuple[int, ...] | None = None
    ranks: tuple[tuple[tuple[int, int | None], ...], ...] = ()
    shapes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.depths is None:
            object.__setattr__(self, "depths", self.proposed)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.emitted)

    @property
    def tokens_per_round(self) -> float | None:
        """Mean acceptance length: tokens added per round, the target's own included. Autoregressive decoding has
        1.00.
        """
        return sum(self.emitted) / self.rounds if self.rounds else None

    @property
    def accepted_per_round(self) -> float | None:
        """Accepted draft tokens per round, the target's own excluded."""
        return sum(self.accepted) / self.rounds if self.rounds else None

    @property
    def acceptance_rate(self) -> float | None:
        """Draft acceptance rate: accepted / proposed draft tokens. None without drafted tokens."""
        return sum(self.accepted) / sum(self.proposed) if sum(self.proposed) else None

    def trials(self, position: int) -> tuple[int, int]:
        """`(successes, trials)` of draft position 1, 2, … among the rounds in which all earlier positions were
        accepted.
        """
        reached = [a for d, a in zip(self.depths, self.accepted, strict=True) if d >= position and a >= position - 1]
        return sum(a >= position for a in reached), len(reached)

    @property
    def conditional_acceptance(self) -> tuple[float | None, ...]:
        """α per position, given that the previous position was accepted."""
        pairs = [self.trials(i) for i in range(1, max(self.depths, default=0) + 1)]
        return tuple(s / n if n else None for s, n in pairs)

    @property
    def marginal_acceptance(self) -> tuple[float | None, ...]:
        """Share of the rounds that proposed a position in which it was accepted."""
        shares = []
        for position in range(1, max(self.depths, default=0) + 1):
            kept = [a >= position for d, a in zip(self.depths, self.accepted, strict=True) if d >= position]
            shares.append(sum(kept) / len(kept))
        return tuple(shares)

    @property
    def rank_acceptance(self) -> tuple[float, ...]:
        """How often the child of each rank is taken at a node that has all of them: what `optimal_tree` takes (once it
        falls from rank to rank).

        Nodes may have few children, so it is put together from the share of each rank among the nodes that have it and
        rejected those before."""
        shares, left = [], 1.0
        for rank in range(max((children for passed in self.ranks for children, _ in passed), default=0)):
            tried = [
                accepted
                for passed in self.ranks
                for children, accepted in passed
                if children > rank and (accepted is None or accepted >= rank)
            ]
            share = sum(accepted == rank for accepted in tried) / len(tried) if tried else 0.0
            shares.append(left * share)
            left *= 1 - share
        return tuple(shares)

    @property
    def round_seconds(self) -> float | None:
        """Mean wall time of a round."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None

    @property
    def overhead(self) -> float | None:
        """Round time / time of one autoregressive step."""
        return self.round_seconds / self.step_seconds if self.seconds and self.step_seconds else None

    @property
    def speedup(self) -> float | None:
        """Tokens per round / overhead."""
        return self.tokens_per_round / self.overhead if self.overhead else None

    def as_dict(self) -> dict:
        """All metrics by name, ready for JSON."""
        names = (
            "rounds",
            "tokens_per_round",
            "accepted_per_round",
            "acceptance_rate",
            "conditional_acceptance",
            "marginal_acceptance",
            "rank_acceptance",
            "round_seconds",
            "step_seconds",
            "overhead",
            "speedup",
        )
        return {name: getattr(self, name) for name in names} | {"shapes": dict(Counter(self.shapes))}


def pool(stats: Sequence[RoundStats]) -> RoundStats:
    """All rounds of several rows as one. Rates become ratios of sums, so a row counts as much as it did rounds."""
    joined = {
        name: tuple(x for s in stats for x in getattr(s, name))
        for name in ("proposed", "accepted", "emitted", "seconds", "depths", "ranks", "shapes")
    }
    steps = [(s.step_seconds, s.rounds) for s in stats if s.step_seconds is not None and s.rounds]
    weight = sum(n for _, n in steps)
    return RoundStats(**joined, step_seconds=sum(t * n for t, n in steps) / weight if weight else None)


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Statistics of one `generate` call: `rows`, one a sequence, and `pooled` over them.

    `prefill_seconds`: until the first round ends, which runs the prompts and yields every row's first tokens;
    `decode_seconds`: the other rounds; `new_tokens`: all tokens generated. `lossless`: whether the acceptance rule
    keeps the target's distribution (or greedy output). `host`: why the host took part in every round; None where rounds
    ran on the device, one ahead of the host."""

    rows: tuple[RoundStats, ...]
    prefill_seconds: float
    decode_seconds: float
    new_tokens: int
    lossless: bool = True
    host: str | None = None
    pooled: RoundStats = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "pooled", pool(self.rows))

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, prefill included."""
        return self.new_tokens / (self.prefill_seconds + self.decode_seconds)

    def as_dict(self) -> dict:
        """Everything, per row and pooled, ready for JSON."""
        return {
            "pooled": self.pooled.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "new_tokens": self.new_tokens,
            "tokens_per_second": self.tokens_per_second,
            "lossless": self.lossless,
            "host": self.host,
        }


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); 95% at the default z. `(0, 1)` without trials.

    >>> [round(x, 3) for x in wilson_interval(7, 10)]
    [0.397, 0.892]
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return min(share, max(0.0, (centre - half) / scale)), max(
        share, min(1.0, (centre + half) / scale)
    )  # rounding must not cross the share
