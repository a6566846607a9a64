"""One round: draft, verify, accept, commit. The same code runs eagerly, compiled and captured in a CUDA graph."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from specdec.acceptance import Acceptance, AcceptanceRule
from specdec.drafters import DraftSession
from specdec.model.features import Features
from specdec.model.runner import ModelRunner, RunnerOutput
from specdec.planning.policy import PLAIN, Shape, shape_of
from specdec.requests.batch import Batch
from specdec.requests.rows import Rows, append
from specdec.rounds.records import Call, end_round, record_outputs, record_round
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
        """Propose tokens, or none in a plain step."""
        if self._session is None or self.shape == PLAIN:
            return Draft(TokenTree.chain(0), batch.last_tokens())
        draft = self._session.propose(batch, self.shape.tree)
        require_fit(batch, draft, self._max_tokens)
        return checked(batch, draft)

    def verify(self, batch: Batch, draft: Draft) -> RunnerOutput:
        """Run the target over the draft -> logits `[A, N, V]`, and features `[A, N, W]` if a drafter reads them."""
        target = batch.rows.target
        if batch.captured:
            memory = batch.rows.memory(target)
            memory.lengths.copy_(batch.rows.lengths - 1)  # node 0 is the last accepted token, which the cache lacks
            return target.forward_rows(memory, draft.tokens, draft.tree, features=self._features)
        return _verify_eagerly(target, batch, draft, self._features)

    def accept(self, batch: Batch, draft: Draft, out: RunnerOutput) -> tuple[Acceptance, Tensor, Tensor, ResultLayout]:
        """Apply the rule; see `verify.verify`."""
        return verify(batch, self._rule, draft, out.logits, out.features)

    def commit(self, batch: Batch, draft: Draft, verdict: Acceptance, emitted: Tensor) -> None:
        """Append the accepted tokens to the rows and move their keys and values to their final places.

        In an eager round the host moves them later; see `run_eagerly`."""
        if batch.captured and not draft.tree.is_chain:
            batch.rows.memory(batch.rows.target).commit(batch.rows.lengths - 1, verdict.path, verdict.counts)
        append(batch.rows, emitted, verdict.counts, batch.index)


def run_eagerly(call: Call, timed: bool = True, usual: bool = True) -> None:
    """Run one round of the active rows, read by the host at once; the first round runs the prompts too.

    usual: whether its time says how long rounds of its shape take."""
    started, shape = time.perf_counter(), call.policy.next()
    captures = sum(runner.graphs_captured for runner in call.runners)
    round = Round(call.rule, call.session, shape, call.features, call.policy.max_tokens)
    batch = Batch(call.rows, call.rows.active, call.request.outputs)
    packed, layout = round(batch)
    shape, tree = round.shape, layout.tree
    if tree is not None and shape != PLAIN and (shape.tree is not None or tree.size == 1):
        shape = shape_of(tree)  # may be smaller than the policy's
    paths = record_round(call, batch.members, layout, packed.tolist())
    record_outputs(call, batch)
    live, starts = [row.sequence for row in batch.members], [row.length_before - 1 for row in batch.members]
    call.rows.target.cache.commit(live, starts, [(0, *path) for path in paths])
    if call.session is not None and shape != PLAIN:
        call.session.commit(batch, paths)
        call.most_new = call.session.min_length(round.shape.tree)
    seconds = time.perf_counter() - started if timed else None
    captured_anew = sum(runner.graphs_captured for runner in call.runners) > captures
    end_round(call, batch.members, shape, seconds, usual and not captured_anew)


def _verify_eagerly(target: ModelRunner, batch: Batch, draft: Draft, features: Features | None) -> RunnerOutput:
    """Run one forward over the tokens of each row that the cache lacks and the draft after them."""
    live, size, tokens = [row.sequence for row in batch.members], draft.tree.size, batch.rows.tokens
    unseen = [tokens[row.slot, target.cache.length(row.sequence) : row.length - 1] for row in batch.members]
    counts = [len(tokens) + size for tokens in unseen]
    if max(counts) == size:
        out = target.forward(live, draft.tokens.flatten(), counts, tree=draft.tree, features=features)
    else:
        packed = torch.cat([piece for pair in zip(unseen, draft.tokens, strict=True) for piece in pair])
        ends = torch.tensor(counts).cumsum(0)[:, None]
        keep = (ends - size + torch.arange(size)).flatten().to(packed.device, non_blocking=True)
        out = target.forward(live, packed, counts, tree=draft.tree, keep=keep, features=features)
    return out.map(lambda x: x.unflatten(0, (len(live), size)))


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
