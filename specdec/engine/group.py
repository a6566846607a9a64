"""The rows of an engine that are sampled alike: one `Call`, whose rows come and go between rounds."""

from collections.abc import Hashable, Sequence

from specdec.acceptance import AcceptanceRule, greedy, lossless
from specdec.cuda_graph import up_to_power
from specdec.drafters import Drafter
from specdec.drafters.base import DraftState, require_session
from specdec.engine.handle import Handle
from specdec.model.runner import ModelRunner
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, FixedPolicy
from specdec.requests.request import Request
from specdec.requests.rows import Row, Rows
from specdec.rounds.packed import Chunk
from specdec.rounds.records import Call, release
from specdec.rounds.round import Turn
from specdec.sampling.noise import row_key

MIN_ROWS, MIN_CAPACITY = 4, 512  # slots, and tokens of each, to begin with


def kind_of(handle: Handle) -> Hashable:
    """What rows must have in common to share a group; a request whose processors run on the host has its own."""
    request = handle.request
    own = handle.arrival if request.processors.warpers is None and request.processors.change_scores else None
    ends = up_to_power(max(1, len(request.eos)))
    return request.do_sample, request.processors.kinds(), request.outputs, ends, len(request.processors.numbers), own


class Group:
    """Rows with `rule` (None: the exact one), drafted for by one session of `drafter`, all in its own shape."""

    def __init__(self, target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule | None, request: Request,
                 room: int):  # fmt: skip
        rule = rule or (lossless if request.do_sample else greedy)
        policy = FixedPolicy(PLAIN, 0) if drafter is None else FixedPolicy(DRAFTERS_OWN, drafter.traits.max_tokens)
        self._room, self._records, self._handles = room, {}, dict[Row, Handle]()  # type: ignore[var-annotated]
        self._ends = up_to_power(max(1, len(request.eos)))
        self.call = Call(self._rows(target, MIN_ROWS, MIN_CAPACITY, request), request, rule, policy, self._records)
        self.call.rows.clear(request)
        self._waits_for_features = False
        if drafter is not None:
            session = drafter.start(self.call.rows, policy.max_tokens)
            require_session(session, drafter)
            self.call.session, self.call.features = session, drafter.traits.features
            self._waits_for_features = drafter.traits.features is not None

    def _rows(self, target: ModelRunner, count: int, capacity: int, request: Request) -> Rows:
        return Rows(target, count, capacity, self._ends, len(request.processors.numbers))

    def handle(self, row: Row) -> Handle:
        """Whose row it is."""
        return self._handles[row]

    def holds(self, row: Row) -> bool:
        """Whether a row is in this group."""
        return row in self._handles

    @property
    def states(self) -> Sequence[DraftState]:
        """Those of the session, if there is one."""
        return self.call.session.states if self.call.session is not None else ()

    def mine(self, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows` that are in this group."""
        return [row for row in rows if row in self._handles]

    def admit(self, handle: Handle) -> Row:
        """A row for a request, with the tokens that it has already, and sequences that are still empty."""
        call, request, record = self.call, handle.request, handle.record
        row = Row(0, 0, 0, handle.limit, -1, request.eos, request.criteria, request.padding[0])
        self._make_room(row)
        numbers = [values[0] for values in request.processors.numbers]
        rounds, key = len(record.emitted), row_key(request.seed, 0)
        call.rows.join(row, [*handle.prompt, *record.new_tokens], key, rounds, numbers)
        row.sequence = call.rows.target.cache.add()
        if call.session is not None:
            call.session.admit(call.rows, [row])
        self._records[row], self._handles[row], handle.row = record, handle, row
        return row

    def _make_room(self, row: Row) -> None:
        """Larger `Rows`, with the same rows, where there is no free slot or the new one is too long."""
        old = self.call.rows
        size, capacity = old.size, old.tokens.shape[1]
        if len(old.members) < size and row.limit + self._room <= capacity:
            return
        size = up_to_power(max(size, len(old.members) + 1))
        rows = self._rows(old.target, size, up_to_power(max(capacity, row.limit + self._room)), self.call.request)
        rows.clear(self.call.request)
        if old.members:
            rows.take_over(old, old.members)
            rows.alive[len(old.members) :] = False
        self.call.rows = rows

    def remove(self, rows: Sequence[Row]) -> None:
        """Let rows go, with all that they hold."""
        release(self.call, rows)
        self.call.rows.leave(rows)
        for row in rows:
            del self._records[row]
            self._handles.pop(row).row = None

    def chunk(self, row: Row, count: int) -> Chunk:
        """The next tokens of a row's text that the target's cache lacks."""
        done = self.call.rows.target.cache.length(row.sequence)
        return row.sequence, self.call.rows.tokens[row.slot, done : done + count]

    def turns(self, rows: Sequence[Row]) -> list[Turn]:
        """The round of some rows. Rows without features are not drafted for yet: their next round gives them."""
        shape = self.call.policy.next()
        waits = lambda row: self._waits_for_features and not row.new_tokens
        fresh, rest = [row for row in rows if waits(row)], [row for row in rows if not waits(row)]
        turns = [Turn(self.call, fresh, PLAIN)] if fresh else []
        return turns + ([Turn(self.call, rest, shape)] if rest else [])
