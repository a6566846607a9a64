"""All groups of an engine, by kind of request: made when the first of a kind comes, dropped after the last."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

from specdec.acceptance import AcceptanceRule
from specdec.drafters import Drafter
from specdec.engine.group import Group, kind_of
from specdec.engine.handle import Handle
from specdec.engine.planner import Planner
from specdec.engine.prefixes import SharedPrefixes
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Row
from specdec.rounds.captured import CapturedRounds
from specdec.rounds.packed import Chunk, run_chunks
from specdec.rounds.round import take_turns

MAX_ROUNDS, MAX_ROWS = 128, 64  # captured rounds that are kept, and sets of slots that these run over


class Groups:
    """The groups of one engine; what they capture and learn outlives them."""

    def __init__(self, target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule | None, planner: Planner,
                 prefixes: SharedPrefixes):  # fmt: skip
        self._target, self._drafter, self._rule, self._planner = target, drafter, rule, planner
        self._prefixes = prefixes
        self._captured = CapturedRounds(target, MAX_ROUNDS, MAX_ROWS)
        self._groups: dict[Hashable, Group] = {}
        self._holding: dict[Row, Group] = {}
        self._on_host = Counter[str]()  # requests that are over, by why their rounds were not captured

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def holding(self, row: Row) -> Group:
        """The group of a row."""
        return self._holding[row]

    def admit(self, handle: Handle) -> Row:
        """Give a request a row."""
        kind = kind_of(handle)
        if kind not in self._groups:
            policy, room = self._planner.policy(handle.request), self._planner.room
            group = Group(self._target, self._drafter, self._rule, handle, policy, self._captured, room, self.failed)
            group.call.emit = partial(self._prefixes.enter_new, group)
            group.share = partial(self._prefixes.take_drafts, group)
            self._groups[kind] = group
        row = self._groups[kind].admit(handle)
        self._holding[row] = self._groups[kind]
        return row

    def leave(self, handle: Handle) -> None:
        """Take a request's row away, if it has one."""
        if handle.row is not None:
            self._holding.pop(handle.row).remove([handle.row])

    def remove(self, handle: Handle) -> None:
        """The same, and drop a group without rows: its session holds memory."""
        if handle.row is not None and (reason := self.holding(handle.row).fallback_reason) is not None:
            self._on_host[reason] += 1
        self.leave(handle)
        group = self._groups.get(kind_of(handle))
        if group is not None and not group.call.rows.members:
            del self._groups[kind_of(handle)]

    def run(self, rows: Sequence[Row], chunks: Sequence[Chunk], beside: bool = False) -> set[Row]:
        """Run a round of `rows`, and `chunks` of prompts -> the rows of which a round has been read.

        beside: whether other work runs in this step."""
        turns = [turn for group in self for turn in group.turns(group.mine(rows))]
        alone = not chunks and not beside and len(turns) + sum(group.busy for group in self) <= 1
        if turns:
            mine = [group for group in self if any(turn.call is group.call for turn in turns)]
            usual = alone and not any(group.captures for group in mine)  # else captured rounds tell of their shape
            take_turns(turns, chunks, usual=usual, failed=self.failed)
        elif chunks:
            run_chunks(self._target, chunks)
        read = set[Row]()
        for group in self:
            read |= {*group.read([row for turn in turns if turn.call is group.call for row in turn.members], alone)}
        return read

    def explain(self) -> str:
        """See `Engine.explain`."""
        running = Counter[str]()
        for group in self:
            if group.fallback_reason is not None:
                running[group.fallback_reason] += len(group.call.rows.members)
        lines = [
            f"rounds on the host, of {running[reason]} requests that run and {self._on_host[reason]} before: {reason}"
            for reason in dict.fromkeys([*self._on_host, *running])
        ]
        return "\n\n".join([self._captured.explain(self._drafter), *(["\n".join(lines)] if lines else [])])

    def drop_rounds(self) -> None:
        """Forget what is in flight, after a failure."""
        for group in self:
            group.drop()

    def failed(self, rows: Sequence[Row], error: Exception) -> None:
        """Note what ends some rows."""
        for row in rows:
            self.holding(row).handle(row).error = error
