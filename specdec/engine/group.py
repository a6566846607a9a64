"""The rows of an engine that are sampled alike: one `Call`, whose rows come and go between rounds."""

from collections.abc import Callable, Hashable, Sequence

from specdec.acceptance import AcceptanceRule, greedy, lossless
from specdec.cuda_graph import up_to_power
from specdec.drafters import Drafter
from specdec.drafters.base import DraftState, require_session, token_states
from specdec.drafters.reach import any_within
from specdec.drafters.suffix_memory import memories_of
from specdec.engine.handle import Handle
from specdec.engine.lane import Lane
from specdec.model.runner import ModelRunner
from specdec.planning.load import LoadPolicy
from specdec.planning.policy import PLAIN, Place, Policy, Shape
from specdec.requests.rows import Row
from specdec.rounds.captured import CapturedRounds
from specdec.rounds.packed import Chunk
from specdec.rounds.records import Call, Failed, release
from specdec.rounds.round import Turn
from specdec.sampling.noise import row_key


def kind_of(handle: Handle) -> Hashable:
    """What rows must have in common to share a group; a request whose processors run on the host has its own."""
    request = handle.request
    own = handle.arrival if request.processors.warpers is None and request.processors.change_scores else None
    ends = up_to_power(max(1, len(request.eos)))
    return request.do_sample, request.processors.kinds(), request.outputs, ends, len(request.processors.numbers), own


class Group:
    """Rows with `rule` (None: the exact one), drafted for by one session of `drafter`.

    policy: what each round drafts.
    captured: its rounds, where they can be.
    failed: called with rows that an exception of their own ends.
    """

    def __init__(self, target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule | None, first: Handle,
                 policy: Policy, captured: CapturedRounds, room: int, failed: Failed):  # fmt: skip
        request, kind = first.request, kind_of(first)
        rule = rule or (lossless if request.do_sample else greedy)
        self._room, self._records, self._handles = room, {}, dict[Row, Handle]()  # type: ignore[var-annotated]
        rows = captured.rows(request, 1, first.limit + room, kind)
        rows.clear(request)
        self.call = Call(rows, request, rule, policy, self._records, memories=(*memories_of(drafter),))
        self._max_length = None if drafter is None else drafter.traits.max_length
        if drafter is not None:
            rows.feature_room = drafter.traits.feature_room
            session = drafter.start(rows, policy.max_tokens)
            require_session(session, drafter)
            self.call.session, self.call.features = session, drafter.traits.features
        self._lane = Lane(self.call, drafter, captured, kind, room, failed)
        self.share: Callable[[Sequence[Row]], list[Row]] = list  # see `SharedPrefixes.take_drafts`
        self._entered = 0  # slots for which the policy has chosen
        self._asleep: set[Row] = set()  # no round of theirs has begun
        self._behind: set[Row] = set()  # draft models have not seen their text
        self._disturbed = False  # whether a step did more than its round

    def handle(self, row: Row) -> Handle:
        """Whose row it is."""
        return self._handles[row]

    def is_behind(self, row: Row) -> bool:
        """Whether draft models have not seen a row's text, and do not see it in its plain rounds."""
        return row in self._behind

    @property
    def states(self) -> Sequence[DraftState]:
        """Those of the session, if there is one."""
        return self.call.session.states if self.call.session is not None else ()

    @property
    def runs_again(self) -> int:
        """Tokens at the end of a text that draft models may run once more, at most."""
        least = 0 if self.call.session is None else self.call.session.min_length(None)
        return max(self.call.most_new, self.call.policy.max_tokens + 1, least)

    def mine(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that are in this group."""
        return [row for row in rows if row in self._handles]

    def admit(self, handle: Handle) -> Row:
        """A row for a request, with the tokens that it has already, and sequences that are still empty."""
        call, request, record = self.call, handle.request, handle.record
        row = Row(0, 0, 0, handle.limit, -1, request.eos, request.criteria, request.padding[0])
        self._fit_slots(1, row.limit + self._room)
        numbers = [values[0] for values in request.processors.numbers]
        call.rows.join(row, [*handle.prompt, *record.new_tokens], row_key(request.seed, 0), numbers)
        row.sequence = call.rows.target.cache.add()
        if call.session is not None:
            call.session.admit(call.rows, [row])
        self._records[row], self._handles[row], handle.row = record, handle, row
        self._asleep.add(row)
        if token_states(call.session):
            self._behind.add(row)
        return row

    def _fit_slots(self, more: int = 0, length: int = 1) -> None:
        """Move the rows to slots that fit them and `more` of up to `length` tokens."""
        old = self.call.rows
        rows = self._lane.fitting_rows(len(old.members) + more, length)
        if rows is not old:
            rows.clear(self.call.request)
            rows.take_over(old, old.members)
            self.call.rows = rows

    def remove(self, rows: Sequence[Row]) -> None:
        """Let rows go, with all that they hold."""
        release(self.call, rows)
        self.call.rows.leave(rows)
        for row in rows:
            self._asleep.discard(row)
            self._behind.discard(row)
            del self._records[row]
            self._handles.pop(row).row = None

    def chunk(self, row: Row, count: int) -> Chunk:
        """The next tokens of a row's text that the target's cache lacks."""
        done = self.call.rows.target.cache.length(row.sequence)
        return Chunk(self.call, row, self.call.rows.tokens[row.slot, done : done + count])

    def turns(self, rows: Sequence[Row]) -> list[Turn]:
        """Launch the captured round of those of `rows` that can have one -> the rounds of the others, for the host.

        Rows without features are not drafted for yet: their next round gives them. Draft models see the text of rows
        that are new to them before a captured round; one of the host sees to that itself."""
        if not rows:
            return []
        call, shape = self.call, self._wanted(rows)
        first, unseen, rest = self._told_apart(self._going(rows), shape)  # the policy may have had rounds read
        begin = self.share(unseen) if unseen else []
        first += [row for row in unseen if row not in begin and row not in self._asleep]
        if begin and self._lane.open:
            begin, rest = self._seen(begin, rest, shape)
        if rest and self._only_awake(rest) and self._launch(rest, shape):
            self._note(rest, shape)
            rest = []
        else:
            self._lane.stop()
        first, begin, rest = map(self._going, (first, begin, rest))
        by_host = [(first, PLAIN), *self._each_its_shape(begin + rest, shape)]
        for some, its in by_host:
            self._wake(some)
            self._note(some, its)
        return [Turn(call, some, its) for some, its in by_host if some]

    def _seen(self, unseen: Sequence[Row], others: Sequence[Row], shape: Shape) -> tuple[list[Row], list[Row]]:
        """Let draft models see the text of `unseen` rows -> rows for a round of the host, and for a captured one.

        The host's are those of which an exception comes: there it ends the requests that it is of."""
        self._lane.pause_before(shape)
        unseen, others = self._going(unseen), self._going(others)
        try:
            for state in self.states:
                state.see(self.call.rows, unseen)
        except Exception:  # some keys may be missing
            for state in self.states:
                state.truncate(unseen, [0] * len(unseen))
            return unseen, others
        self._behind.difference_update(unseen)
        self._disturbed = True
        if self.call.emit is not None:
            self.call.emit(unseen)  # what draft models have computed is there for others in the next step
        return [], [*others, *unseen]

    def _told_apart(self, rows: Sequence[Row], shape: Shape) -> tuple[list[Row], list[Row], list[Row]]:
        """Rows without features, rows whose text draft models have not seen, and the others; in plain rounds all."""
        first, unseen, rest = list[Row](), list[Row](), list[Row]()
        if shape == PLAIN:
            return first, unseen, list(rows)
        for row in rows:
            (first if self._lacks_features(row) else unseen if row in self._behind else rest).append(row)
        if rest and not self.call.rows.features_valid:  # a row has come back to a group that is new
            self.call.rows.features_valid = self.call.rows.features is not None
        return first, unseen, rest

    def _lacks_features(self, row: Row) -> bool:
        """Whether the next round of a row has to give the features of its last token first.

        One that made room is drafted for at once where those of its whole text are read, which were computed again:
        it goes on as it would have."""
        features = self.call.features
        if features is None or row.new_tokens:
            return False
        return features.tokens == "last" or not self._records[row].new_tokens

    def _wanted(self, rows: Sequence[Row]) -> Shape:
        """The shape that the policy wants, after it has seen the load; plain where no text is short enough."""
        call, policy = self.call, self.call.policy
        if call.session is None or not any_within(rows, self._max_length):
            return PLAIN
        if isinstance(policy, LoadPolicy):
            self._fit_slots()
            policy.look(rows)
            if call.rows.size != self._entered:
                self._entered = call.rows.size
                policy.enter(self._place(rows))
        return policy.next()

    def _place(self, rows: Sequence[Row]) -> Place:
        lane, slots = self._lane, self.call.rows
        seconds = lambda shape: lane.seconds(shape, rows)
        left = lambda: max(row.limit - row.length for row in rows)
        return Place(slots.size, left, lane.holds, seconds, measures=lane.open and slots.tokens.is_cuda)

    def _each_its_shape(self, rows: Sequence[Row], shape: Shape) -> list[tuple[list[Row], Shape]]:
        """Rows with the shapes that they are given in a round on the host."""
        policy = self.call.policy
        if shape == PLAIN or not isinstance(policy, LoadPolicy):
            return [(list(rows), shape)]
        shapes = policy.of_rows(rows)
        return [
            ([row for row, its in zip(rows, shapes, strict=True) if its == one], one) for one in dict.fromkeys(shapes)
        ]

    def _only_awake(self, rows: Sequence[Row]) -> bool:
        """Whether no row but `rows`, members all, would take part in a captured round."""
        members = self.call.rows.members
        awake = (row for row in members if row not in self._asleep and not row.ended)
        return len(rows) == len(members) or {*awake} <= {*rows}

    def _launch(self, rows: Sequence[Row], shape: Shape) -> bool:
        if not self._lane.open:
            return False
        self._fit_slots()
        self._wake(rows)
        return self._lane.launch(rows, shape)

    def _wake(self, rows: Sequence[Row]) -> None:
        new = [row for row in rows if row in self._asleep] if self._asleep else []
        self.call.rows.wake(new)
        self._asleep.difference_update(new)

    def _note(self, rows: Sequence[Row], shape: Shape) -> None:
        """Remember whether draft models see the text of `rows` in a round of `shape`."""
        if token_states(self.call.session):
            self._behind = self._behind | {*rows} if shape == PLAIN else self._behind - {*rows}

    def _going(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that have neither ended nor left."""
        return [row for row in rows if row in self._handles and not row.ended]

    def read(self, by_host: Sequence[Row], alone: bool) -> list[Row]:
        """Read what need not stay in flight -> all rows of which a round has been read in this step.

        by_host: those of the rounds of the host; alone: whether nothing ran in the step but one round."""
        if not alone or self._disturbed:
            self._lane.disturb()
        self._disturbed = False
        self._lane.read()
        rows = [row for row in (*by_host, *self._lane.take_landed()) if row in self._handles]
        if isinstance(policy := self.call.policy, LoadPolicy):
            going = [row for row in rows if not row.ended and self._handles[row].error is None]
            policy.observe_rows((row, self._records[row].shapes[-1].name, len(row.new_tokens)) for row in going)
        return rows

    @property
    def captures(self) -> bool:
        """Whether its rounds can be captured."""
        return self._lane.open

    @property
    def fallback_reason(self) -> str | None:
        """Why its rounds are not captured; None: they are."""
        return self.call.fallback_reason

    @property
    def busy(self) -> bool:
        """Whether a captured round is in flight."""
        return self._lane.busy

    def drop(self) -> None:
        """Forget what is in flight, after a failure."""
        self._lane.drop()
