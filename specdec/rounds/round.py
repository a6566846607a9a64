"""One round: draft, verify, accept, commit. The same code runs eagerly, compiled and captured in a CUDA graph."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.acceptance import Acceptance, AcceptanceRule
from specdec.drafters import DraftSession
from specdec.drafters.base import readers_of, take_in
from specdec.model.features import Features
from specdec.model.runner import RunnerOutput
from specdec.planning.policy import PLAIN, Shape, shape_of
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows, append
from specdec.rounds.followed import followed_draft, followed_outcome
from specdec.rounds.packed import Chunk, verify_together
from specdec.rounds.records import Call, Failed, end_round, record_outputs, record_round
from specdec.rounds.verify import ResultLayout, checked, require_fit, verify
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


class Round:
    """One round of a batch with `rule` and drafts of `shape`, at most `max_tokens`; without a session a plain step.

    Drafts keep their full size near a row's limit, since otherwise a row's noise would depend on other rows' limits.
    """

    def __init__(self, rule: AcceptanceRule, session: DraftSession | None, shape: Shape, features: Features | None,
                 max_tokens: int = 0):  # fmt: skip
        self._rule, self._session, self._features, self._max_tokens = rule, session, features, max_tokens
        self.shape = PLAIN if session is None else shape

    def __call__(self, batch: Batch) -> tuple[Tensor, ResultLayout]:
        """Run the four phases -> the packed outcome `[A, W]` and the layout of its columns."""
        draft = self.draft(batch)
        verdict, emitted, packed, layout = self.accept(batch, draft, self.verify(batch, draft))
        self.commit(batch, draft, verdict, emitted)
        return packed, layout

    def draft(self, batch: Batch) -> Draft:
        """Propose tokens, or none in a plain step, in which what reads all features keeps up."""
        if self._session is None or self.shape == PLAIN:
            for reader in readers_of(self._session):
                reader.keep_up(batch)
            return Draft(TokenTree.chain(0), batch.last_tokens())
        batch.nodes = self.shape.nodes
        draft = self._session.propose(batch, self.shape.tree)
        for reader in () if batch.captured else readers_of(self._session):
            reader.keep_up(batch)  # in rows that got no draft, being too long, say
        require_fit(batch, draft, self._max_tokens)
        return followed_draft(batch.rows.target.ranks, checked(batch, draft))

    def verify(self, batch: Batch, draft: Draft) -> RunnerOutput:
        """Run the target over the draft -> logits `[A, N, V]`, and features `[A, N, W]` if a drafter reads them."""
        target = batch.rows.target
        if batch.captured:
            memory = batch.rows.memory(target)
            # node 0 is the last accepted token, which the cache lacks
            torch.sub(batch.rows.lengths, 1, out=memory.lengths)
            return target.forward_rows(memory, draft.tokens, draft.tree, features=self._features)
        return verify_together(target, [(batch, draft)], self._features)[0][0]

    def accept(self, batch: Batch, draft: Draft, out: RunnerOutput) -> tuple[Acceptance, Tensor, Tensor, ResultLayout]:
        """Apply the rule; see `verify.verify`."""
        outcome = verify(batch, self._rule, draft, out.logits, out.features)
        return followed_outcome(batch.rows.target.ranks, *outcome)

    def commit(self, batch: Batch, draft: Draft, verdict: Acceptance, emitted: Tensor) -> None:
        """Append the accepted tokens to the rows and move their keys and values to their final places.

        In an eager round the host moves them later; see `take_turns`."""
        if batch.captured:
            memory = batch.rows.memory(batch.rows.target)
            memory.commit_states(verdict.path, verdict.counts)
            if not draft.tree.is_chain:
                memory.commit(batch.rows.lengths - 1, verdict.path, verdict.counts)
        append(batch.rows, emitted, verdict.counts, batch.index)


@dataclass(frozen=True, slots=True)
class Turn:
    """A round of some rows of a call, to be run by the host: the draft's `shape` is what the policy wants."""

    call: Call
    members: Sequence[Row]
    shape: Shape


def run_eagerly(call: Call, timed: bool = True, usual: bool = True) -> None:
    """Run one round of the active rows, read by the host at once; the first round runs the prompts too.

    usual: whether its time says how long rounds of its shape take."""
    take_turns([Turn(call, call.rows.active, call.policy.next())], timed=timed, usual=usual)


def take_turns(turns: Sequence[Turn], chunks: Sequence[Chunk] = (), timed: bool = True, usual: bool = True,
               failed: Failed | None = None) -> None:  # fmt: skip
    """Run one round of each turn, read by the host at once: drafts one after the other, then a forward over all.

    chunks: of prompts that run in the same forward.
    failed: called with rows whose round an exception ended, and that exception (None: it is raised)."""
    started, target = time.perf_counter(), turns[0].call.rows.target if turns else None
    runners = {id(runner): runner for turn in turns for runner in turn.call.runners}.values()
    captures = sum(runner.graphs_captured for runner in runners)
    drafted = []
    for turn in turns:
        call = turn.call
        round = Round(call.rule, call.session, turn.shape, call.features, call.policy.max_tokens)
        batch = Batch(call.rows, turn.members, call.request.outputs)
        with _reported(turn.members, failed):
            drafted.append((call, round, batch, round.draft(batch)))
    if not drafted or target is None:
        return
    features = next((call.features for call, *_ in drafted if call.features is not None), None)
    outs, unseen = verify_together(target, [(batch, draft) for *_, batch, draft in drafted], features, chunks)
    for (call, _, batch, _), of_texts in zip(drafted, unseen, strict=True):
        take_in(call.session, call.rows, batch.members, of_texts)
    verified = []
    for (call, round, batch, draft), out in zip(drafted, outs, strict=True):
        with _reported(batch.members, failed):
            verdict, emitted, packed, layout = round.accept(batch, draft, out)
            round.commit(batch, draft, verdict, emitted)
            verified.append((call, round, batch, packed, layout))
    ended = [_end_turn(call, round, batch, packed, layout, failed) for call, round, batch, packed, layout in verified]
    seconds = target.ranks.decided(time.perf_counter() - started) if timed else None
    captured_anew = sum(runner.graphs_captured for runner in runners) > captures
    for (call, round, _, _, layout), rows in zip(verified, ended, strict=True):
        end_round(call, rows, _shape_that_ran(round, layout), seconds, usual and not captured_anew)


def _shape_that_ran(round: Round, layout: ResultLayout) -> Shape:
    """The round's shape, or the smaller one that its drafter proposed."""
    shape, tree = round.shape, layout.tree
    small = tree is not None and shape != PLAIN and (shape.tree is not None or tree.size == 1)
    return shape_of(tree) if small and tree is not None else shape


def _end_turn(call: Call, round: Round, batch: Batch, packed: Tensor, layout: ResultLayout,
              failed: Failed | None) -> list[Row]:  # fmt: skip
    """Record a verified round, commit its accepted paths, and return the rows that did not fail."""
    paths = record_round(call, batch.members, layout, packed.tolist(), failed)
    record_outputs(call, batch)
    kept = [(row, path) for row, path in zip(batch.members, paths, strict=True) if path is not None]
    live, starts = [row.sequence for row, _ in kept], [row.length_before - 1 for row, _ in kept]
    call.rows.target.cache.commit(live, starts, [(0, *path) for _, path in kept])
    if call.session is not None and _shape_that_ran(round, layout) != PLAIN:
        call.session.commit(batch, [path or () for path in paths])
        least, whole = call.session.min_length(round.shape.tree), len(batch.members) == len(call.rows.active)
        call.most_new = least if whole else max(call.most_new, least)  # other rows may lack what their draft left out
    return [row for row, _ in kept]


@contextmanager
def _reported(rows: Sequence[Row], failed: Failed | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed(rows, error)


def plain_step(rows: Rows) -> Callable[[], None]:
    """A function that runs one plain step of all active rows and drops its result; for timing."""
    target, live = rows.target, [row.sequence for row in rows.active]
    batch = Batch(rows, rows.active)

    def step() -> None:
        logits = target.forward(live, batch.last_tokens()[:, 0], [1] * len(live)).logits
        logits.argmax(-1).tolist()
        for sequence in live:
            target.cache.truncate(sequence, target.cache.length(sequence) - 1)

    return step
