"""Statistics of a generation, round by round, and the metrics that papers report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

METRICS = (
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


@dataclass(frozen=True, slots=True)
class RoundStats:
    """Rounds of one row, or of several rows pooled, with one entry a round in each tuple.

    proposed: drafted tokens, all nodes of a tree, except those past the row's limit.
    accepted: drafted tokens that were kept.
    emitted: tokens added, including the target's own.
    seconds: wall time, which all rows of a batch share; lacks each row's first round, which includes the prompt.
    step_seconds: time of one plain step of the target at this batch size; None: not measured.
    depths: the largest number of tokens that could be accepted (default: `proposed`, as for chains).
    ranks: for each node on the accepted path, with the root: (number of children, rank of the accepted child or None).
    shapes: what the policy chose: "plain", "own", "grown 64", "chain 4", "tree 16 x 5".
    uncut: of each round (drafted nodes, levels, accepted nodes) with those after an end-of-text and past the limit
        (default: the numbers above), for `specdec.report.definitions`.
    """

    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    emitted: tuple[int, ...]
    seconds: tuple[float, ...]
    step_seconds: float | None = None
    depths: tuple[int, ...] = ()
    ranks: tuple[tuple[tuple[int, int | None], ...], ...] = ()
    shapes: tuple[str, ...] = ()
    uncut: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self):
        if not self.depths:
            object.__setattr__(self, "depths", self.proposed)
        if not self.uncut:
            object.__setattr__(self, "uncut", tuple(zip(self.proposed, self.depths, self.accepted, strict=True)))

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.emitted)

    @property
    def tokens_per_round(self) -> float | None:
        """Mean acceptance length: tokens added per round, with the target's own; 1.00 for autoregressive decoding."""
        return sum(self.emitted) / self.rounds if self.rounds else None

    @property
    def accepted_per_round(self) -> float | None:
        """Accepted draft tokens per round, without the target's own token."""
        return sum(self.accepted) / self.rounds if self.rounds else None

    @property
    def acceptance_rate(self) -> float | None:
        """Draft acceptance rate: accepted / proposed draft tokens. None without drafted tokens."""
        return sum(self.accepted) / sum(self.proposed) if sum(self.proposed) else None

    def trials(self, position: int) -> tuple[int, int]:
        """`(accepted, tried)` at a draft position (from 1), among rounds in which all earlier ones were accepted."""
        reached = [a for d, a in zip(self.depths, self.accepted, strict=True) if d >= position and a >= position - 1]
        return sum(a >= position for a in reached), len(reached)

    @property
    def conditional_acceptance(self) -> tuple[float | None, ...]:
        """Acceptance rate per position, given that the previous position was accepted."""
        pairs = [self.trials(i) for i in range(1, max(self.depths, default=0) + 1)]
        return tuple(s / n if n else None for s, n in pairs)

    @property
    def marginal_acceptance(self) -> tuple[float | None, ...]:
        """Acceptance rate per position, among all rounds that proposed it."""
        shares = []
        for position in range(1, max(self.depths, default=0) + 1):
            kept = [a >= position for d, a in zip(self.depths, self.accepted, strict=True) if d >= position]
            shares.append(sum(kept) / len(kept))
        return tuple(shares)

    @property
    def rank_acceptance(self) -> tuple[float, ...]:
        """How often the child of each rank is accepted at a node with children of all ranks: see `optimal_tree`.

        Nodes have different numbers of children. The result therefore combines, for each rank, the acceptance rate
        among nodes that have a child of this rank and rejected those before."""
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

    def choice_trials(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """`(accepted, offered)` of the child of each rank, by depth: among the nodes of accepted paths that have one.

        The last node of a whole accepted path has no child and offers nothing."""
        found = []
        for depth in range(max(map(len, self.ranks), default=0)):
            here = [passed[depth] for passed in self.ranks if len(passed) > depth]
            widest = max(children for children, _ in here)
            offered = [[accepted for children, accepted in here if children > rank] for rank in range(widest)]
            found.append(tuple((of.count(rank), len(of)) for rank, of in enumerate(offered)))
        return tuple(of for of in found if of)

    @property
    def round_seconds(self) -> float | None:
        """Mean wall time of a round."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None

    @property
    def overhead(self) -> float | None:
        """Round time / time of one autoregressive step."""
        seconds = self.round_seconds
        return seconds / self.step_seconds if seconds is not None and self.step_seconds else None

    @property
    def speedup(self) -> float | None:
        """Tokens per round / overhead."""
        tokens = self.tokens_per_round
        return tokens / self.overhead if tokens is not None and self.overhead else None

    def __str__(self) -> str:
        """A table of the metrics, a line each, in the words of the README."""
        lines = {
            "rounds": self.rounds, "tokens per round": self.tokens_per_round, "acceptance rate": self.acceptance_rate,
            "overhead": self.overhead, "speedup": self.speedup,
        }  # fmt: skip
        notes = {
            "acceptance rate": f"{sum(self.accepted)} of {sum(self.proposed)} drafted tokens",
            "overhead": "a round in plain steps", "speedup": "tokens per round / overhead",
        }  # fmt: skip
        shapes = ", ".join(f"{name} ({count})" for name, count in Counter(self.shapes).most_common())
        return _lines(lines, notes) + (f"\nshapes            {shapes}" if shapes else "")

    def as_dict(self) -> dict:
        """All metrics by name, ready for JSON."""
        return {name: getattr(self, name) for name in METRICS} | {"shapes": dict(Counter(self.shapes))}


def pool(stats: Sequence[RoundStats]) -> RoundStats:
    """All rounds of several rows as one; a row's weight in each rate is its number of rounds."""
    joined = {
        name: tuple(x for s in stats for x in getattr(s, name))
        for name in ("proposed", "accepted", "emitted", "seconds", "depths", "ranks", "shapes", "uncut")
    }
    steps = [(s.step_seconds, s.rounds) for s in stats if s.step_seconds is not None and s.rounds]
    weight = sum(n for _, n in steps)
    return RoundStats(**joined, step_seconds=sum(t * n for t, n in steps) / weight if weight else None)


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Statistics of one `generate` call: for each of the `rows`, and `pooled`.

    prefill_seconds: time until the end of the first round, which runs the prompts and yields each row's first tokens.
    decode_seconds: time of all other rounds.
    new_tokens: number of tokens generated in all rows.
    lossless: whether the acceptance rule preserves the target's distribution (or greedy output).
    host: why rounds needed the host; None if they ran on the device, with the next round launched ahead.
    remembered: answers of earlier calls that the drafter's memory held when the call began; 0: it was cold.
    timing_seconds: spent on timing plain steps, as part of neither of the two.
    """

    rows: tuple[RoundStats, ...]
    prefill_seconds: float
    decode_seconds: float
    new_tokens: int
    lossless: bool = True
    host: str | None = None
    remembered: int = 0
    timing_seconds: float = 0.0
    pooled: RoundStats = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "pooled", pool(self.rows))

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, with the time of the prefill."""
        return self.new_tokens / (self.prefill_seconds + self.decode_seconds)

    def __str__(self) -> str:
        """A table of all rows pooled, and of the call."""
        rows = f"in {len(self.rows)} rows" if len(self.rows) > 1 else ""
        lines = {"new tokens": self.new_tokens, "tokens per second": self.tokens_per_second}
        seconds = f"prefill {self.prefill_seconds:.3f} s, decoding {self.decode_seconds:.3f} s"
        more = f"\nlossless          {'yes' if self.lossless else 'no'}"
        device = "captured" if self.host is None else f"run by the host: {self.host}"
        table = _lines(lines, {"new tokens": rows, "tokens per second": seconds})
        warm = f"\nremembered        {self.remembered} answers of earlier calls" if self.remembered else ""
        return f"{table}\n{self.pooled}{more}\nrounds are        {device}{warm}"

    def as_dict(self) -> dict:
        """All statistics, per row and pooled, ready for JSON."""
        return {
            "pooled": self.pooled.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "new_tokens": self.new_tokens,
            "tokens_per_second": self.tokens_per_second,
            "lossless": self.lossless,
            "host": self.host,
            "remembered": self.remembered,
        }


def _lines(values: Mapping[str, float | int | None], notes: Mapping[str, str]) -> str:
    """A line a value: its name, the number (a dash for None), a note in brackets."""
    shown = {name: "-" if x is None else str(x) if isinstance(x, int) else f"{x:.2f}" for name, x in values.items()}
    return "\n".join(
        f"{name:16} {text:>9}" + (f"  ({notes[name]})" if notes.get(name) and text != "-" else "")
        for name, text in shown.items()
    )


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95% for the default z; `(0, 1)` without trials. Source: Wilson 1927.

    >>> [round(x, 3) for x in wilson_interval(7, 10)]
    [0.397, 0.892]
    """
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low, high = max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
    return min(share, low), max(share, high)  # despite rounding, the interval includes the share
