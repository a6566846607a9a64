"""Captured rounds: a round as one function of tensors, which a CUDA graph replays; `launched` runs them."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attention.paged.device_batch import DeviceSequences
from specdec.acceptance import AcceptanceRule
from specdec.acceptance.base import is_built_in
from specdec.cuda_graph import ByIdentity, GraphCache, HostCopy, up_to_power
from specdec.drafters import Drafter, DraftSession
from specdec.drafters.base import readers_of, runners_elsewhere, runners_of
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, Policy, Shape
from specdec.requests.batch import Batch
from specdec.requests.request import Request
from specdec.requests.rows import Row, Rows
from specdec.rounds.records import Call
from specdec.rounds.round import Round
from specdec.rounds.verify import ResultLayout

MIN_CAPACITY = 512  # tokens of a row; longer ones take powers of two, so that texts of similar lengths share graphs


class CapturedRound:
    """`round` over all slots of `rows`, captured once and launched many times."""

    layout: ResultLayout  # set by the first run

    def __init__(self, round: Round, rows: Rows, min_length: int):
        self.rows, self.min_length, self._round = rows, min_length, round
        target, alive = rows.target, rows.alive.clone()
        rows.alive.zero_()  # the runs before the capture must change no row
        try:
            self._graph = target.capture(self._run, "a round")
            self.bytes = self._graph.bytes
        finally:
            rows.alive.copy_(alive)

    @torch.inference_mode()
    def _run(self) -> Tensor:
        packed, self.layout = self._round(Batch(self.rows, most_new=self.min_length))
        return packed

    def launch(self) -> HostCopy:
        """Run one round of all rows."""
        return HostCopy(self._graph())


class CapturedRounds:
    """The rounds that a generator has captured, and the rows that they run over."""

    MAX_ROUNDS, MAX_ROWS = 32, 8

    def __init__(self, target: ModelRunner, max_rounds: int = MAX_ROUNDS, max_rows: int = MAX_ROWS):
        self._target, self._rows = target, GraphCache(max_rows)
        self._rounds = GraphCache(max_rounds, lambda round: round.bytes)

    def drop_graphs(self) -> None:
        """Drop all rounds and rows; called by the runners whose models they run."""
        self._rounds.clear()
        self._rows.clear()

    def fallback_reason(self, drafter: Drafter | None, rule: AcceptanceRule, request: Request,
                        policy: Policy) -> str | None:  # fmt: skip
        """Why this call's rounds cannot be captured; None: they can."""
        if self._target.mode == "eager":
            return 'the target runs with mode="eager"'
        if self._target.auto and self._target.device.type == "cpu" and not is_built_in(rule):
            return 'an acceptance rule of your own may be more than a function of tensors; mode="graph" records it'
        if (reason := self.drafters_reason(drafter)) is not None:
            return reason
        if request.outputs:
            return f"output_{' and output_'.join(request.outputs)} are kept by the host in every round"
        if request.processors.need_host:
            names = ", ".join(request.processors.need_host)
            return f"logits processors of a kind, or in an order, that needs the host: {names}"
        if not policy.few_shapes:
            return "the shape of each round depends on the outcome of the rounds before"
        return None

    def drafters_reason(self, drafter: Drafter | None) -> str | None:
        """Why no call with this drafter can have captured rounds; None: some can."""
        for runner in runners_elsewhere(drafter, self._target):
            return f"the draft model is on {runner.device}, the target on {self._target.device}"
        if any(runner.recurrent for runner in runners_of(drafter)):
            return "a draft model keeps recurrent states, which captured rounds do not carry yet"
        if self._target.auto and any(runner.hooked for runner in runners_of(drafter)):
            return "a draft model has hooks, which replays would not call"
        if drafter is not None and not drafter.traits.captured:
            return f"a {type(drafter).__name__} needs the host in every round"
        return None

    def explain(self, drafter: Drafter | None) -> str:
        """Tables, of the target and each draft model (`ModelRunner.explain`), and why no round is captured, if so."""
        tables = [runner.explain() for runner in (self._target, *runners_of(drafter))]
        reason = self.drafters_reason(drafter)
        return "\n\n".join([*tables, *([] if reason is None else [f"rounds run on the host: {reason}"])])

    def rows(self, request: Request, slots: int, capacity: int, owner: Hashable = None) -> Rows:
        """`slots` slots for rows of `request` of at least `capacity` tokens, with another call's contents.

        owner: whose, if it uses them beside others."""
        ends, numbers = max(1, len(request.eos)), len(request.processors.numbers)
        key = slots, max(MIN_CAPACITY, up_to_power(capacity)), up_to_power(ends), numbers
        return self._rows.get((owner, *key), lambda: Rows(self._target, *key))

    def of(self, drafter: Drafter | None, call: Call, shape: Shape) -> CapturedRound:
        """A captured round of `call`'s rows. Raises CannotCapture."""
        session = session_in(call, shape)
        return self._rounds.get(self._key(drafter, call, shape), lambda: self._make(session, call, shape))

    def target_step(self, call: Call) -> CapturedRound:
        """A captured step of the target alone, without what a drafter does in plain rounds. Raises CannotCapture."""
        alone = replace(call, session=None, features=None) if readers_of(call.session) else call
        return self.of(None, alone, PLAIN)

    def held(self, drafter: Drafter | None, call: Call, shape: Shape) -> CapturedRound | None:
        """The same if it is captured already, else None."""
        return self._rounds.held(self._key(drafter, call, shape))

    def _key(self, drafter: Drafter | None, call: Call, shape: Shape) -> tuple:
        own = None
        if (session := session_in(call, shape)) is not None:
            own = ByIdentity(drafter), session.reads, most_new(call, shape)
        settings = call.request.do_sample, call.request.processors.kinds(), call.features
        return own, shape, ByIdentity(call.rows), ByIdentity(call.rule), *settings

    def _make(self, session: DraftSession | None, call: Call, shape: Shape) -> CapturedRound:
        runners = [call.rows.target, *(state.runner for state in (session.states if session else ()))]
        round = Round(call.rule, session, shape, call.features, call.policy.max_tokens)
        made = CapturedRound(round, call.rows, most_new(call, shape))
        for runner in runners:
            runner.graph_holders.add(self)
        return made


def session_in(call: Call, shape: Shape) -> DraftSession | None:
    """The session that takes part in rounds of `shape`: in plain ones where it reads the features of all tokens."""
    return None if shape == PLAIN and not readers_of(call.session) else call.session


def most_new(call: Call, shape: Shape) -> int:
    """Tokens that a captured round of `shape` runs again: those that it or the round before leaves draft models without
    (`Batch.most_new`)."""
    session = session_in(call, shape)
    return 1 if session is None else max(call.most_new, session.min_length(shape.tree))


def take_pages(rows: Rows, members: Sequence[Row], lengths: Sequence[int], room: int,
               session: DraftSession | None) -> list[tuple[DeviceSequences, list[int]]]:  # fmt: skip
    """Take pages for texts of `lengths` tokens of some rows, since captured rounds cannot take any -> the tables that
    these read in each cache, and the sequences of `members` there.

    room: tokens past a row's limit.
    session: of the drafter that takes part in the rounds (None: there is none).
    """
    live = [row.sequence for row in members]
    if (kept := rows.target.cache.states) is not None:
        read = [row for row in members if not row.ahead]  # else the device has moved them on already
        kept.settle([row.sequence for row in read], [row.length - 1 for row in read])
    rows.target.cache.extend_to(live, [length + room for length in lengths])
    states = session.states if session else ()
    drafted = [(rows.memory(state.runner, state.draft_room), state.with_pages(members, lengths)) for state in states]
    return [(rows.memory(rows.target), live), *drafted]


def take_all_pages(rows: Rows, room: int, session: DraftSession | None) -> None:
    """Take all pages that the active rows, which lie in the first slots, may ever need, and write block tables."""
    active = rows.active
    held = take_pages(rows, active, [row.limit for row in active], room, session)
    for place, (table, sequences) in enumerate(held):
        table.load(sequences, [0 if place else row.length for row in active])
