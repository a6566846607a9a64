"""What captured rounds draft: of few shapes the one with the most expected tokens per measured second.

* Acceptance: `PathCounts`, of all rounds of one drafter and kind of sampling, whatever their shape.
* Time: `RoundTimes`, for each number of rows. A shape is measured when it is captured, by replays that change no row,
  and by every round that runs; times of shapes that were not are predicted, and good enough to rule them out.

Capturing takes as long as hundreds of rounds, so a shape is captured where it promises much, or little for long
(`_worth`); where rows are few only because others have ended, once what is lost there would have paid for it. Shapes
change between rounds, at once where both are captured. Before new shapes are considered the largest and deepest tree
runs for a few rounds, the scout: how often a path is accepted depends on its ranks, and small trees tell of few paths.
While speculation does not pay rounds are plain, and it is tried again for a hundredth of the time.

Drafts also make the rows of a batch end at different times; what that loses is learned from calls (`IdleSlots`)."""

from collections.abc import Callable, Sequence
from functools import cache

from specdec.planning.candidates import Candidates
from specdec.planning.fit import Fit
from specdec.planning.idle_slots import IdleSlots
from specdec.planning.policy import PLAIN, Place, Ranks, Shape
from specdec.planning.tree_search import Path

LOOK_EVERY = 16  # rounds between two choices
NEW_AT_ONCE = 2  # shapes that are captured before rounds go on
FEW, HOPE = 8, 0.01  # shapes, and trees, that are tried readily: predictions are raised for each that is not there
SWITCH = 0.005  # share of speed for which a captured shape is taken
NEW, MUCH = 0.02, 0.06  # for which a new shape is captured, one of few or a further one
CAPTURE_SECONDS, CATCH_UP_SECONDS = 0.3, 0.03  # of a capture; of a round on the host after plain ones
ENOUGH_LEFT = 24  # tokens that the rows still want, for which new shapes are measured
TAIL_SECONDS = 1.0  # of rounds after which shapes are measured where rows are few since others have ended
SCOUT_ROUNDS = 8  # of the scout, before new shapes are considered
KEPT_ROUNDS = 128.0  # weight of earlier calls' acceptance
PROBE_ROUNDS = 8  # that try again whether drafting pays
TRY_SHARE = 0.01  # of the time, which probes and scouts may lose


class FittedPolicy:
    """Chooses the shape of each captured round; see the module. `rows`: those that the first rounds have."""

    few_shapes = True

    def __init__(self, fit: Fit, candidates: Candidates, rows: int, max_tokens: int):
        self._fit, self._candidates = fit, candidates
        self.max_tokens = max(max_tokens, candidates.max_tokens)
        self._first = self._times = fit.times_of(rows)
        self._idle = fit.idle.setdefault(rows, IdleSlots())
        self._shape = fit.last.get(rows, candidates.first())
        self._before: Shape | None = None  # while the scout runs, the shape that ran before
        self._place: Place | None = None
        self._until_look, self._probing = LOOK_EVERY, False
        self._grown: list[Shape] = []
        fit.counts.fade_to(KEPT_ROUNDS)

    @property
    def step_seconds(self) -> float | None:
        """The time of a plain round; None: not measured yet."""
        return self._first.step

    def next(self) -> Shape:
        """The shape chosen last."""
        return self._shape

    def enter(self, place: Place) -> None:
        """Measure plain rounds and promising shapes for the rows there, and choose."""
        came_from = None if self._place is None else self._place.rows
        self._place, self._times = place, self._fit.times_of(place.rows)
        times, known = self._times, len(self._times.known)
        self._end_scouting()
        measures = self._measures()
        if not measures or self._in_tail() and place.rows != came_from:
            self._settle()
        if measures and times.step is None:
            self._measure(PLAIN)
        if not self._scouts(pauses=True):
            explores = measures and (times.review_due or not times.knows(self._shape)) and not self._probing
            if measures and not times.knows(self._shape):  # of the rows of before, or wanted since the last visit
                self._measure(self._shape)
            for _ in range(NEW_AT_ONCE if explores else 0):
                wish = self._choose(explores=True)
                if times.knows(wish):
                    break
                self._measure(wish)
            if explores or came_from not in (None, place.rows):
                self._choose()
        if len(times.known) > known:
            self._fit.kept.save(place.rows, times.known)

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """See `Policy.observe`."""
        fit, times = self._fit, self._times
        if seconds is not None:
            times.learn(shape, seconds)
        if shape == PLAIN:
            fit.plain_seconds += seconds or 0.0
        else:
            fit.observe(shape, ranks, tokens)
            times.scouted += shape == fit.scouts.get(times.rows)
        self._until_look -= 1
        if self._until_look <= 0 and self._place is not None and not self._scouts(pauses=False):
            self._end_scouting()
            self._choose(explores=times.review_due and times.step is not None and self._measures())

    def finish(self, rounds: Sequence[int], tokens: Sequence[int]) -> None:
        """See `Policy.finish`."""
        self._idle.add(rounds, tokens, cache(lambda slots: self._fit.relative_seconds(slots, self._first.rows)))

    def _in_tail(self) -> bool:
        """Whether there are fewer rows than at the start, as others have ended."""
        return self._times.rows < self._first.rows

    def _measures(self) -> bool:
        """Whether new shapes may be captured: for enough tokens, and in a tail if its rounds took long so far."""
        assert self._place is not None
        return self._place.left() >= ENOUGH_LEFT and (not self._in_tail() or self._times.decoded >= TAIL_SECONDS)

    def _measure(self, shape: Shape) -> None:
        assert self._place is not None
        self._times.measured(shape, self._place.seconds(shape))

    def _settle(self) -> None:
        """Take the fastest of the captured shapes, if there is one, rather than capture the present shape here."""
        place = self._place
        assert place is not None
        if not place.captured(self._shape):
            reached = self._fit.counts.reach()
            held = [one for one in self._shapes(reached) if self._times.knows(one) and place.captured(one)]
            self._shape = max(held, key=lambda shape: self._speed(shape, reached), default=self._shape)

    def _scouts(self, pauses: bool) -> bool:
        """Let the scout run if that is due before new shapes are considered; in a pause it is captured first."""
        fit, times = self._fit, self._times
        due = times.review_due and times.scouted < SCOUT_ROUNDS and self._shape != PLAIN and not self._probing
        if not due or self._in_tail() or not self._measures():
            return False
        if times.rows not in fit.scouts:
            fit.scouts[times.rows] = self._candidates.scout(fit.counts.reach(), times.rows)
        scout = fit.scouts[times.rows]
        if scout is None or not self._affords(scout):
            return False
        if pauses and not times.knows(scout):
            self._measure(scout)
        if times.refuses(scout):
            return False
        self._before, self._shape = self._before or self._shape, scout
        self._until_look = SCOUT_ROUNDS - times.scouted
        return True

    def _affords(self, scout: Shape) -> bool:
        """Whether nothing is known yet, or the scout is expected to lose little of the time so far."""
        fit, times = self._fit, self._times
        reached = fit.counts.reach()
        now, then = self._speed(self._shape, reached), self._speed(scout, reached)
        lost = SCOUT_ROUNDS * times.seconds(scout) * (now - then)  # tokens
        return not fit.counts.tried or lost <= TRY_SHARE * times.decoded * now

    def _end_scouting(self) -> None:
        """Return to the shape before, unless it has never run here."""
        before, self._before = self._before, None
        if before is not None and (self._in_tail() or self._times.knows(before)):
            self._shape = before

    def _choose(self, explores: bool = False) -> Shape:
        """Choose the next rounds' shape, among those whose time is known or all, and return it."""
        self._until_look, ended_probe, self._probing = LOOK_EVERY, self._probing, False
        place, times, fit = self._place, self._times, self._fit
        assert place is not None
        if times.step is None and not times.knows(self._shape):
            return self._shape
        reached = fit.counts.reach()
        shapes = self._shapes(reached, explores)
        able = dict.fromkeys([self._shape, *(shape for shape in shapes if explores or times.knows(shape))])
        missing = 0 if self._in_tail() else max(0, FEW - len(times.known))
        hope = lambda shape: 1.0 if times.knows(shape) else 1 + HOPE * missing
        speed = {shape: hope(shape) * self._speed(shape, reached) for shape in able}
        wanted = max((shape for shape in able if self._worth(shape, speed)), key=speed.__getitem__)
        fit.last[place.rows] = wanted
        if wanted == PLAIN and not ended_probe:
            wanted = self._probe(speed)
        if wanted.tree is not None and not wanted.tree.is_chain and wanted not in fit.trees:
            fit.trees = [*fit.trees, wanted][-FEW:]
        self._shape = wanted
        return wanted

    def _shapes(self, reached: Callable[[Path], float], explores: bool = False) -> list[Shape]:
        """What to choose from: plain rounds, chains, and trees, newly grown ones too if it `explores`."""
        return [PLAIN, *self._candidates.chains(self._times.rows), *self._trees(reached, explores)]

    def _trees(self, reached: Callable[[Path], float], explores: bool) -> list[Shape]:
        """The trees to consider: the scout, those of before that are small enough, and newly grown ones."""
        fit, rows = self._fit, self._times.rows
        fits = lambda shape: shape.tree is not None and self._candidates.fits(shape.tree.size, rows)
        before = [shape for shape in [fit.scouts.get(rows), *fit.trees] if shape is not None and fits(shape)]
        if not explores:
            return before
        if self._times.review_due:
            self._times.reviewed()
            gain = lambda shape: fit.tokens(shape, reached)
            most = {shape.name: max(gain(one) for one in before if one.name == shape.name) for shape in before}
            grown = self._candidates.trees(reached, rows)
            self._grown = [shape for shape in grown if gain(shape) > 1.02 * most.get(shape.name, 0.0)]
        return [*before, *self._grown]

    def _speed(self, shape: Shape, reached: Callable[[Path], float]) -> float:
        """Expected tokens a second, less what idle slots lose."""
        tokens = self._fit.tokens(shape, reached)
        useful = tokens if self._times.rows == 1 else self._idle.useful(tokens)
        return useful / self._times.seconds(shape)

    def _worth(self, shape: Shape, speed: dict[Shape, float]) -> bool:
        """Whether to change to `shape`, for what it gains; true for the present one, and if that cannot be captured."""
        now, place, times, trees = self._shape, self._place, self._times, self._fit.trees
        assert place is not None
        if shape == now or not (speed[now] and speed[shape]):
            return shape == now or not speed[now]
        gain, left = speed[shape] / speed[now] - 1, place.left()
        saved = left * (times.step or 0.0) * gain / (1 + gain)
        if now == PLAIN and self._fit.has_model and saved < CATCH_UP_SECONDS:
            return False
        if place.captured(shape):
            return gain > SWITCH
        chain = shape.tree is None or shape.tree.is_chain
        few = times.knows(shape) or len(times.known) < FEW and (chain or shape in trees or len(trees) < FEW)
        readily = gain > (NEW if few else MUCH) and not self._in_tail()
        return (readily or gain > SWITCH and gain * times.decoded > CAPTURE_SECONDS) and self._measures()

    def _probe(self, speed: dict[Shape, float]) -> Shape:
        """The shape that tries again whether drafting pays, if there was time enough for it; else plain."""
        fit, times, place = self._fit, self._times, self._place
        assert place is not None and times.step is not None
        drafts = [shape for shape in speed if shape != PLAIN and place.captured(shape)]
        if not drafts or place.left() < ENOUGH_LEFT:
            return PLAIN
        shape = max(drafts, key=speed.__getitem__)
        lost = PROBE_ROUNDS * max(0.0, times.seconds(shape) - times.step) + fit.has_model * CATCH_UP_SECONDS
        if lost > TRY_SHARE * fit.plain_seconds:
            return PLAIN
        fit.plain_seconds, self._probing, self._until_look = 0.0, True, PROBE_ROUNDS
        fit.counts.fade_to(PROBE_ROUNDS)
        return shape
