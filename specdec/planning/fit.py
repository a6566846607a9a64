"""What a generator learns of captured rounds for one kind of sampling, and keeps between calls."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec.planning.candidates import LENGTHS, chain
from specdec.planning.grown_counts import GrownCounts
from specdec.planning.idle_slots import IdleSlots
from specdec.planning.kept_times import KeptTimes
from specdec.planning.path_counts import PathCounts, tokens_of
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, Ranks, Shape, grown_shape
from specdec.planning.round_times import RoundTimes
from specdec.planning.tree_search import Path


@dataclass(slots=True)
class Fit:
    """See the module.

    trees: those that were grown so far.
    scouts: the tree that runs before new shapes are considered (None: there is none), by number of rows; it is kept, so
        that it is captured once.
    last: the shape last chosen, by number of rows.
    idle: what drafts lose in slots of rows that have ended, by number of rows at the start of a call.
    plain_seconds: seconds of plain rounds since drafting was last tried.
    """

    has_model: bool = False
    kept: KeptTimes = field(default_factory=KeptTimes)
    counts: PathCounts = field(default_factory=PathCounts)
    own: tuple[float, float] = (2.0, 1.0)  # tokens and rounds of the drafter's own shape, with earlier rounds faded
    grown: GrownCounts = field(default_factory=GrownCounts)
    times: dict[int, RoundTimes] = field(default_factory=dict)
    trees: list[Shape] = field(default_factory=list)
    scouts: dict[int, Shape | None] = field(default_factory=dict)
    last: dict[int, Shape] = field(default_factory=dict)
    idle: dict[int, IdleSlots] = field(default_factory=dict)
    plain_seconds: float = 0.0

    def times_of(self, rows: int) -> RoundTimes:
        """The times for so many rows, those that were kept among them."""
        if rows not in self.times:
            self.times[rows] = RoundTimes(rows, self.has_model, self.kept.load(rows))
        return self.times[rows]

    def forget_texts(self) -> None:
        """Drop what texts have taught; the times of rounds stay."""
        new = Fit()
        for name in ("counts", "own", "grown", "trees", "scouts", "last", "idle", "plain_seconds"):
            setattr(self, name, getattr(new, name))
        for times in self.times.values():
            times.forget_rounds()

    def tokens(self, shape: Shape, reached: Callable[[Path], float]) -> float:
        """Expected tokens of a round, for `counts.reach()`."""
        if shape == PLAIN:
            return 1.0
        if shape.nodes:
            return self.grown.tokens(shape.nodes)
        return self.own[0] / self.own[1] if shape.tree is None else tokens_of(shape.tree, reached)

    def observe(self, shape: Shape, ranks: Sequence[Ranks], tokens: float) -> None:
        """Learn from a round with a draft; see `Policy.observe`."""
        if shape.nodes:
            self.grown.observe(shape.nodes, tokens)
        elif shape.tree is None:
            self.own = 0.97 * self.own[0] + tokens, 0.97 * self.own[1] + 1
        else:
            self.counts.observe(ranks)

    def relative_seconds(self, rows: int, most: int) -> float:
        """The time of a round with `rows` rows to that of one with `most`, from shapes that have run with both; else
        that of twice as many rows."""
        if rows >= most:
            return 1.0
        fewer, all_rows = self.times_of(rows).known, self.times_of(most).known
        ratios = [fewer[name][2] / all_rows[name][2] for name in fewer if name in all_rows]
        return min(1.0, statistics.median(ratios)) if ratios else self.relative_seconds(2 * rows, most)

    def beliefs(self, rows: int) -> dict[str, dict[str, float]]:
        """What is expected of the shapes whose time is known for so many rows: `tokens` and `seconds` of a round, and
        `speed`, tokens a second less what idle slots lose. Of trees of one size and depth the one with most tokens."""
        times, reached, found = self.times_of(rows), self.counts.reach(), {}
        scout = self.scouts.get(rows)
        shapes = [
            PLAIN,
            DRAFTERS_OWN,
            *map(chain, LENGTHS),
            *map(grown_shape, self.grown.seen),
            *self.trees,
            *([scout] if scout else []),
        ]
        for shape in sorted(shapes, key=lambda shape: self.tokens(shape, reached)):
            if shape.name in times.known:
                tokens, seconds = self.tokens(shape, reached), times.seconds(shape)
                speed = self.idle.get(rows, IdleSlots()).useful(tokens) / seconds
                found[shape.name] = {"tokens": tokens, "seconds": seconds, "speed": speed}
        return found
