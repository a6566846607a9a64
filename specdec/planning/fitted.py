"""What captured rounds draft: of few shapes the one with the most expected tokens per measured second.

* Acceptance: `PathCounts`, of all rounds of one drafter and kind of sampling, whatever their shape.
* Time: `RoundTimes`, for each number of rows. A shape is measured when it is captured, by replays that change no row,
  and by every round that runs; times of shapes that were not are predicted, and good enough to rule them out.

Capturing takes as long as hundreds of rounds, so a shape is captured where it promises much, or little for long
(`_worth`). Shapes change between rounds, at once where both are captured. While speculation does not pay rounds are
plain, and it is tried again for a hundredth of the time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec.planning.candidates import Candidates
from specdec.planning.kept_times import KeptTimes
from specdec.planning.path_counts import PathCounts, tokens_of
from specdec.planning.policy import PLAIN, Place, Ranks, Shape
from specdec.planning.round_times import RoundTimes
from specdec.planning.tree_search import Path

LOOK_EVERY = 16  # rounds between two choices
NEW_AT_ONCE = 2  # shapes that are captured before rounds go on
FEW = 8  # shapes, and trees, that are tried readily, as if predictions were HOPE too slow
SWITCH, HOPE = 0.005, 0.03  # shares of speed: for which a captured shape is taken, and of predictions
NEW, MUCH = 0.02, 0.06  # for which a new shape is captured, one of few or a further one
CAPTURE_SECONDS, CATCH_UP_SECONDS = 0.3, 0.03  # of a capture; of a round on the host after plain ones
ENOUGH_LEFT = 24  # tokens that the rows still want, for which new shapes are measured
KEPT_ROUNDS = 128.0  # weight of earlier calls' acceptance
PROBE_ROUNDS, PROBE_SHARE = 8, 0.01  # rounds that try again whether drafting pays, and their share of the time


@dataclass(slots=True)
class Fit:
    """What a generator learns for one kind of sampling and keeps between calls.

    trees: those that were grown so far.
    last: the shape last chosen, by number of rows.
    plain_seconds: seconds of plain rounds since drafting was last tried.
    """

    has_model: bool = False
    kept: KeptTimes = field(default_factory=KeptTimes)
    counts: PathCounts = field(default_factory=PathCounts)
    own: tuple[float, float] = (2.0, 1.0)  # tokens and rounds of the drafter's own shape, with earlier rounds faded
    times: dict[int, RoundTimes] = field(default_factory=dict)
    trees: list[Shape] = field(default_factory=list)
    last: dict[int, Shape] = field(default_factory=dict)
    plain_seconds: float = 0.0

    def times_of(self, rows: int) -> RoundTimes:
        """The times for so many rows, those that were kept among them."""
        if rows not in self.times:
            self.times[rows] = RoundTimes(rows, self.has_model, self.kept.load(rows))
        return self.times[rows]


class FittedPolicy:
    """Chooses the shape of each captured round; see the module. `rows`: those that the first rounds have."""

    few_shapes = True

    def __init__(self, fit: Fit, candidates: Candidates, rows: int, max_tokens: int):
        self._fit, self._candidates = fit, candidates
        self.max_tokens = max(max_tokens, candidates.max_tokens)
        self._first = self._times = fit.times_of(rows)
        self._shape = fit.last.get(rows, candidates.first())
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
        moved = self._place is not None and place.rows != self._place.rows
        self._place, self._times = place, self._fit.times_of(place.rows)
        times, known, measures = self._times, len(self._times.known), place.left() >= ENOUGH_LEFT
        if measures and times.step is None:
            self._measure(PLAIN)
        if times.step is None:
            return
        explores = measures and (times.review_due or not times.knows(self._shape)) and not self._probing
        if measures and not times.knows(self._shape):  # of the rows of before, or wanted since the last visit
            self._measure(self._shape)
        for _ in range(NEW_AT_ONCE if explores else 0):
            wish = self._choose(explores=True)
            if times.knows(wish):
                break
            self._measure(wish)
        if moved or explores:
            self._choose()
        if len(times.known) > known:
            self._fit.kept.save(place.rows, times.known)

    def observe(self, shape: Shape, seconds: float | None, ranks: Sequence[Ranks], tokens: float) -> None:
        """See `Policy.observe`."""
        fit = self._fit
        if seconds is not None:
            self._times.learn(shape, seconds)
        if shape == PLAIN:
            fit.plain_seconds += seconds or 0.0
        elif shape.tree is None:
            fit.own = 0.97 * fit.own[0] + tokens, 0.97 * fit.own[1] + 1
        else:
            fit.counts.observe(ranks)
        self._until_look -= 1
        if self._until_look <= 0 and self._place is not None and self._times.step is not None:
            self._choose(explores=self._times.review_due and self._place.left() >= ENOUGH_LEFT)

    def _measure(self, shape: Shape) -> None:
        assert self._place is not None
        self._times.measured(shape, self._place.seconds(shape))

    def _choose(self, explores: bool = False) -> Shape:
        """Choose the next rounds' shape, among those whose time is known or all, and return it."""
        self._until_look, ended_probe, self._probing = LOOK_EVERY, self._probing, False
        place, times, fit = self._place, self._times, self._fit
        assert place is not None
        reached = fit.counts.reach()
        shapes = [PLAIN, *self._candidates.chains(), *self._trees(reached, explores)]
        able = dict.fromkeys([self._shape, *(shape for shape in shapes if explores or times.knows(shape))])
        hope = lambda shape: 1 + HOPE * (len(times.known) < FEW and not times.knows(shape))
        speed = {shape: hope(shape) * self._tokens(shape, reached) / times.seconds(shape) for shape in able}
        wanted = max((shape for shape in able if self._worth(shape, speed)), key=speed.__getitem__)
        fit.last[place.rows] = wanted
        if wanted == PLAIN and not ended_probe:
            wanted = self._probe(speed)
        if wanted.tree is not None and not wanted.tree.is_chain and wanted not in fit.trees:
            fit.trees = [*fit.trees, wanted][-FEW:]
        self._shape = wanted
        return wanted

    def _trees(self, reached: Callable[[Path], float], explores: bool) -> list[Shape]:
        """The trees to consider: those of before that are small enough, and newly grown ones."""
        fit, rows = self._fit, self._times.rows
        before = [
            shape for shape in fit.trees if shape.tree is not None and self._candidates.fits(shape.tree.size, rows)
        ]
        if not explores:
            return before
        if self._times.review_due:
            self._times.reviewed()
            gain = lambda shape: self._tokens(shape, reached)
            most = {shape.name: max(gain(one) for one in before if one.name == shape.name) for shape in before}
            grown = self._candidates.trees(reached, rows)
            self._grown = [shape for shape in grown if gain(shape) > 1.02 * most.get(shape.name, 0.0)]
        return [*before, *self._grown]

    def _tokens(self, shape: Shape, reached: Callable[[Path], float]) -> float:
        if shape == PLAIN:
            return 1.0
        return self._fit.own[0] / self._fit.own[1] if shape.tree is None else tokens_of(shape.tree, reached)

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
        enough = gain > (NEW if few else MUCH) or gain > SWITCH and gain * times.decoded > CAPTURE_SECONDS
        return enough and left >= ENOUGH_LEFT

    def _probe(self, speed: dict[Shape, float]) -> Shape:
        """The shape that tries again whether drafting pays, if there was time enough for it; else plain."""
        fit, times, place = self._fit, self._times, self._place
        assert place is not None and times.step is not None
        drafts = [shape for shape in speed if shape != PLAIN and place.captured(shape)]
        if not drafts or place.left() < ENOUGH_LEFT:
            return PLAIN
        shape = max(drafts, key=speed.__getitem__)
        lost = PROBE_ROUNDS * max(0.0, times.seconds(shape) - times.step) + fit.has_model * CATCH_UP_SECONDS
        if lost > PROBE_SHARE * fit.plain_seconds:
            return PLAIN
        fit.plain_seconds, self._probing, self._until_look = 0.0, True, PROBE_ROUNDS
        fit.counts.fade_to(PROBE_ROUNDS)
        return shape
