"""How much the requests of an engine draft, from the load, each request's acceptance and measured times.

Rounds of all rows on the device have one shape, that with the most expected tokens a second for the rows there; rounds
that the host runs may have one for each row. Times are those of the number of slots (`RoundTimes`). At a new number of
slots plain rounds come first, unless times of about as many rows leave no doubt."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from specdec.planning.fit import Fit
from specdec.planning.policy import PLAIN, Place, Ranks, Shape
from specdec.planning.round_times import RoundTimes
from specdec.planning.tree_search import Path

LOOK_EVERY, LOOK_SOON = 16, 4  # rounds between two choices, and after a shape was taken whose time is not known there
SWITCH, SWITCH_MODEL = 0.02, 0.05  # gain for which the shape changes, and where a draft model must first catch up
HOPE = 0.05  # by which a shape is taken for faster than predicted until it has run there, once another draft has
CLEAR = 1.25  # times as fast: so much better a shape of a similar number of rows is taken without a measurement
USUAL_TOKENS = 8.0  # accepted tokens that the usual acceptance counts for beside a request's own
PROBE_ROUNDS, TRY_SHARE = 8, 0.01  # that try again whether drafting pays; of the time, which they may lose
CATCH_UP_SECONDS = 0.03  # of each row, whose text a draft model has not seen
ENOUGH_LEFT = 24  # tokens that some row still wants, for which a shape is captured and measured


@dataclass(slots=True)
class Acceptance:
    """Drafted tokens that a request's rounds accepted, and those that the usual acceptance let expect."""

    accepted: float = 0.0
    expected: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times the usual number of tokens is accepted."""
        return (self.accepted + USUAL_TOKENS) / (self.expected + USUAL_TOKENS)


@dataclass(slots=True)
class LoadPolicy:
    """Chooses the shapes of a group's rounds; see the module.

    fit: what is known of the drafter with this kind of sampling; it outlives the policy.
    shapes: those that drafts may have, the drafter's own first.
    max_tokens: drafted tokens of the largest.
    most_nodes: of all slots together, up to which shapes larger than the first one are taken.
    """

    fit: Fit
    shapes: Sequence[Shape]
    max_tokens: int
    few_shapes: bool = True
    most_nodes: float = math.inf
    _shape: Shape = PLAIN
    _place: Place | None = None
    _rows: Sequence[Hashable] = ()
    _accepted: dict[Hashable, Acceptance] = field(default_factory=dict)
    _until_look: int = 0
    _probing: bool = False

    @property
    def step_seconds(self) -> float | None:
        """The time of a plain round; None: not measured yet."""
        return None if self._place is None else self.fit.times_of(self._place.rows).step

    def next(self) -> Shape:
        """The shape chosen last."""
        return self._shape

    def enter(self, place: Place) -> None:
        """Choose for another number of slots, where shapes may be measured."""
        self._place = place
        times = self.fit.times_of(place.rows)
        if place.measures and place.left() >= ENOUGH_LEFT and self._similar() is None:
            for _ in range(2):  # plain rounds, and what promises most beside them
                wish = PLAIN if times.step is None else self._best(times)
                if times.knows(wish):
                    break
                times.measured(wish, place.seconds(wish))
        self._choose()

    def look(self, rows: Sequence[Hashable]) -> None:
        """Take note of the rows of the next round, and choose anew where that is due."""
        self._rows = rows
        self._accepted = {row: self._accepted.get(row) or Acceptance() for row in rows}
        if self._place is not None and (self._until_look <= 0 or self.step_seconds is None):
            self._choose()

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """See `Policy.observe`."""
        self._until_look -= 1
        if seconds is not None and self._place is not None:
            self.fit.times_of(self._place.rows).learn(shape, seconds)
        if shape == PLAIN:
            self.fit.plain_seconds += seconds or 0.0
        else:
            self.fit.observe(shape, ranks, tokens)

    def observe_rows(self, rounds: Iterable[tuple[Hashable, str, int]]) -> None:
        """Learn from rounds that did not end their row: the row, the shape's name, and the tokens that it brought."""
        reached = self.fit.counts.reach()
        expected = {shape.name: self.fit.tokens(shape, reached) - 1 for shape in self.shapes[::-1]}
        for row, name, tokens in rounds:
            if name in expected and row in self._accepted:
                self._accepted[row].accepted += tokens - 1
                self._accepted[row].expected += expected[name]

    def finish(self, rounds: Sequence[int], tokens: Sequence[int]) -> None:
        """Do nothing: rows come and go."""

    def of_rows(self, rows: Sequence[Hashable]) -> list[Shape]:
        """The shape of each row in a round on the host: no deeper than the one that pays for all rows together.

        A row drafts what is worth its time: expected tokens, less what the time of its nodes brings elsewhere."""
        common, times = self._shape, self._known_times()
        if common.tree is None or times is None or len(rows) == 1:
            return [common] * len(rows)
        reached, depth = self.fit.counts.reach(), common.tree.max_depth
        node = times.seconds_of_node(common) / times.rows
        speed = len(rows) * self._tokens(common, reached, 1.0) / times.seconds(common)
        worth = {
            shape: (self._tokens(shape, reached, 1.0) - 1, speed * node * shape.tokens)
            for shape in self._fitting(self._place.rows if self._place else 1)
            if shape.tree is not None and shape.tree.max_depth <= depth
        }
        return [_most_worth(worth, self._ratio([row])) for row in rows]

    def _fitting(self, rows: int) -> list[Shape]:
        """The shapes that so many slots may draft."""
        own = self.shapes[0].tokens
        return [shape for shape in self.shapes if shape.tokens <= own or (shape.tokens + 1) * rows <= self.most_nodes]

    def _ratio(self, rows: Sequence[Hashable]) -> float:
        """How many times the usual number of tokens `rows` accept."""
        ratios = [(self._accepted.get(row) or Acceptance()).ratio for row in rows]
        return sum(ratios) / len(ratios) if ratios else 1.0

    def _tokens(self, shape: Shape, reached: Callable[[Path], float], ratio: float) -> float:
        """Expected tokens of a round of a row that accepts `ratio` times the usual number."""
        most = math.inf if shape.tree is None else shape.tree.max_depth
        return 1.0 if shape == PLAIN else 1 + min(most, ratio * (self.fit.tokens(shape, reached) - 1))

    def _known_times(self) -> RoundTimes | None:
        """Those of the slots there, or of about as many if these leave no doubt."""
        assert self._place is not None
        own = self.fit.times_of(self._place.rows)
        return own if own.step is not None else self._similar()

    def _similar(self) -> RoundTimes | None:
        """Times of half to twice as many slots, of which some shape is clearly better than plain rounds, or worse."""
        assert self._place is not None
        rows = self._place.rows
        near = [one for one in self.fit.times.values() if one.step is not None and rows <= 2 * one.rows <= 4 * rows]
        for times in sorted(near, key=lambda one: abs(one.rows - rows)):
            speeds = self._speeds(times)
            best = max(speed for shape, speed in speeds.items() if shape != PLAIN)
            if (
                times.rows >= rows
                and best > CLEAR * speeds[PLAIN]
                or times.rows <= rows
                and CLEAR * best < speeds[PLAIN]
            ):
                return times
        return None

    def _speeds(self, times: RoundTimes) -> dict[Shape, float]:
        """Expected tokens a second of a row, for each shape that fits."""
        assert self._place is not None
        reached, ratio, fitting = self.fit.counts.reach(), self._ratio(self._rows), self._fitting(self._place.rows)
        return {one: self._tokens(one, reached, ratio) / times.seconds(one) for one in (PLAIN, *fitting)}

    def _best(self, times: RoundTimes) -> Shape:
        speeds = self._speeds(times)
        return max(speeds, key=speeds.__getitem__)

    def _choose(self) -> None:
        """Choose the next rounds' shape."""
        self._until_look, ended_probe, self._probing = LOOK_EVERY, self._probing, False
        times, now = self._known_times(), self._shape
        if times is None or self._place is None:
            self._shape = PLAIN  # to learn its time
            return
        speeds = self._speeds(times)
        if now != PLAIN:
            speeds = {one: speed * (1.0 if times.knows(one) else 1 + HOPE) for one, speed in speeds.items()}
        best = max(speeds, key=speeds.__getitem__)
        least = SWITCH_MODEL if self.fit.has_model and PLAIN in (best, now) else SWITCH
        if best != now and speeds[best] > (1 + least) * speeds.get(now, 0.0):
            self._shape = best
        if not self.fit.times_of(self._place.rows).knows(self._shape):
            self._until_look = LOOK_SOON
        if self._shape == PLAIN and not ended_probe:
            self._probe(times, speeds)

    def _probe(self, times: RoundTimes, speeds: dict[Shape, float]) -> None:
        """Draft again for a few rounds, if there were plain ones enough."""
        assert times.step is not None
        shape = max(self._fitting(times.rows), key=speeds.__getitem__)
        lost = PROBE_ROUNDS * max(0.0, times.seconds(shape) - times.step)
        lost += self.fit.has_model * CATCH_UP_SECONDS * len(self._rows)
        if lost <= TRY_SHARE * self.fit.plain_seconds:
            self._shape, self._probing, self._until_look = shape, True, PROBE_ROUNDS
            self.fit.plain_seconds = 0.0
            self.fit.counts.fade_to(PROBE_ROUNDS)


def _most_worth(worth: dict[Shape, tuple[float, float]], ratio: float) -> Shape:
    """The shape with the most usual tokens times `ratio`, less the second number; plain if none has any left."""
    left = {shape: ratio * tokens - lost for shape, (tokens, lost) in worth.items()}
    best = max(left, key=left.__getitem__)
    return best if left[best] > 0 else PLAIN
