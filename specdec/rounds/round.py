"""One round: draft, verify, accept, commit."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.acceptance import Acceptance, AcceptanceRule
from specdec.cuda_graph import CapturedGraph, HostCopy
from specdec.drafters import DraftSession
from specdec.model.features import Features
from specdec.model.runner import ModelRunner, RunnerOutput
from specdec.planning.policy import PLAIN, Shape, shape_of
from specdec.requests.request import Request
from specdec.requests.rows import DeviceContext, DraftContext
from specdec.rounds.records import _Call, _end_round, _hear
from specdec.rounds.verify import ResultLayout, checked, verify
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


class DeviceRounds:
    """Rounds of up to `num_rows` rows, of one shape. Recorded once, over rows of padding, and loaded for every call
    that asks for the same.

    Raises CannotRecord for a model or a drafter that cannot be recorded.
    """

    def __init__(
        self,
        target: ModelRunner,
        session: DraftSession | None,
        rule: AcceptanceRule,
        request: Request,
        context: DraftContext,
        shape: Shape,
        num_rows: int,
        capacity: int,
    ):
        hidden = None if context.hidden is None else context.hidden.shape[1]
        self.num_rows, self.layout, self.rows = num_rows, None, {}
        self.context = DeviceContext(target, request, num_rows, capacity, hidden)
        self._session = None if session is None or shape == PLAIN else session.on_device(self.context, shape.tree)
        self._state = None if self._session is None else self._session.state
        self._rule, self._tree = rule, shape.tree
        self._round = CapturedGraph(self._run, target.device, target.graph_pool, f"a round of {target.name}")

    @property
    def runners(self) -> tuple[ModelRunner, ...]:
        """Of the models that a round runs."""
        return (self.context.target,) if self._state is None else (self.context.target, self._state.runner)

    @property
    def min_length(self) -> int:
        """Tokens that every row must have before it is loaded."""
        return 1 if self._state is None else self._state.width

    def load(self, context: DraftContext, session: DraftSession | None, rows: Sequence[int]) -> None:
        """Take up `rows`, at most `num_rows`, whose pages are all there."""
        self.rows = {row: place for place, row in enumerate(rows)}
        self.context.load(context, rows)
        if self._state is not None:
            self._state.load(session.state, rows)

    def unload(self, context: DraftContext) -> None:
        """Hand back what the host does not hear round by round, or does not write down. Behind the end of a text may
        lie anything.
        """
        self.context.unload(context, list(self.rows))

    def launch(self) -> HostCopy:
        """Run one round of all rows."""
        return HostCopy(self._round())

    def stop(self, rows: Sequence[int]) -> None:
        """`rows` have ended."""
        self.context.alive[[self.rows[row] for row in rows]] = False

    def draft(self) -> Draft:
        """Propose."""
        context = self.context
        if self._session is None:
            return Draft(TokenTree.chain(0), context.last_tokens(context.rows))
        return checked(context, self._session.propose(context.rows, self._tree))

    def verify(self, draft: Draft) -> RunnerOutput:
        """Run the target over the draft."""
        context = self.context
        context.sequences.lengths.copy_(context.lengths - 1)  # node 0 is the last accepted token, which the cache lacks
        return context.target.forward_rows(
            context.sequences, draft.tokens, draft.tree, features=None if context.hidden is None else Features()
        )

    def accept(self, draft: Draft, out: RunnerOutput) -> tuple[Acceptance, Tensor, Tensor, ResultLayout]:
        """See `verify`."""
        return verify(self.context, self._rule, draft, out.logits, out.features, self.context.rows)

    @torch.inference_mode()
    def _run(self) -> Tensor:
        self.context.begin()
        draft = self.draft()
        verdict, emitted, answer, self.layout = self.accept(draft, self.verify(draft))
        self.context.advance(draft, verdict, emitted)
        return answer


def _host_round(call: _Call, timed: bool = True) -> None:
    """One propose -> verify -> accept -> commit cycle of the active rows. A row's prompt goes through with its first
    draft.
    """
    context, session, active, started = call.context, call.session, call.active, time.perf_counter()
    recorded = sum(runner.graphs_captured for runner in call.runners)
    cache, live, shape = context.target.cache, [context.sequences[row] for row in active], call.policy.next()
    # drafts keep their full size at the end of a row: a shorter one would let a row's noise depend on its neighbours'
    # budgets
    if session is None or shape == PLAIN:
        draft, shape = Draft(TokenTree.chain(0), context.last_tokens(active)), PLAIN
    else:
        draft = checked(context, session.propose(active, shape.tree))
        if isinstance(draft.tree, TokenTree) and (shape.tree is not None or draft.tree.size == 1):
            shape = shape_of(draft.tree)  # which may be less than was asked for
    starts = [context.lengths[row] - 1 for row in active]  # where node 0 lies
    unseen = [
        context.tokens[row, cache.length(sequence) : start]
        for row, sequence, start in zip(active, live, starts, strict=True)
    ]
    logits, hidden = _verify(context.target, live, unseen, draft, context.wants_hidden)
    _, _, answer, layout = verify(context, call.rule, draft, logits, hidden, active)
    paths = _hear(call, active, layout, answer.tolist())
    cache.commit(live, starts, [(0, *path) for path in paths])
    if shape != PLAIN:
        session.commit(active, paths)
    seconds = time.perf_counter() - started if timed else None
    _end_round(call, active, shape, seconds, sum(runner.graphs_captured for runner in call.runners) > recorded)


def _verify(
    target: ModelRunner, live: list[int], unseen: list[Tensor], draft: Draft, hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits `[A, N, V]` after every node (and hidden states `[A, N, H]`), from one forward over the draft and the
    tokens `unseen [n]` before it.
    """
    size, features = draft.tree.size, Features() if hidden else None
    counts = [len(tokens) + size for tokens in unseen]
    if max(counts) == size:
        out = target.forward(live, draft.tokens.flatten(), counts, tree=draft.tree, features=features)
    else:
        packed = torch.cat(
            [piece for tokens, nodes in zip(unseen, draft.tokens, strict=True) for piece in (tokens, nodes)]
        )
        ends = torch.tensor(counts).cumsum(0)[:, None]
        keep = (ends - size + torch.arange(size)).flatten().to(packed.device, non_blocking=True)
        out = target.forward(live, packed, counts, tree=draft.tree, keep=keep, features=features)
    return tuple(None if x is None else x.unflatten(0, (len(live), size)) for x in (out.logits, out.features))


def _plain_step(context: DraftContext) -> None:
    """One autoregressive step of all rows whose result is thrown away: what a round is compared with."""
    cache, live = context.target.cache, list(context.sequences.values())
    logits = context.target.forward(live, context.last_tokens(list(context.sequences))[:, 0], [1] * len(live)).logits
    logits.argmax(-1).tolist()
    for sequence in live:
        cache.truncate(sequence, cache.length(sequence) - 1)
