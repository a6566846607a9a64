"""Rounds that run without the host: draft, verify, accept and commit as one function of tensors, which a CUDA graph replays.

The host launches a round before it has read what the one before gave; what a round did is read one round late, from one small tensor. Rows
end on the device at their limit and at end-of-text tokens. A row that the host ends (a stopping criterion) is told so, and what it drafted
meanwhile is forgotten.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.acceptance import Acceptance, AcceptanceRule
from specdec.cuda_graph import Itself, Recorded, Reply, Shelf
from specdec.drafters import Drafter, DraftSession
from specdec.model.runner import ModelRunner, RunnerOutput
from specdec.planning.policy import PLAIN, Fixed, Policy, Shape
from specdec.requests.request import Request
from specdec.requests.rows import DeviceContext, DraftContext
from specdec.rounds.verify import Layout, checked, judge
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree

MIN_CAPACITY = 512  # tokens of a row that a recording has room for, then the next powers of two: texts of similar length share one


class DeviceRounds:
    """Rounds of up to `num_rows` rows, of one shape. Recorded once, over rows of padding, and loaded for every call that asks for the same.

    Raises CannotRecord for a model or a drafter that cannot be recorded.
    """

    def __init__(self, target: ModelRunner, session: DraftSession | None, rule: AcceptanceRule, request: Request, context: DraftContext, shape: Shape,
                 num_rows: int, capacity: int):  # fmt: skip
        hidden = None if context.hidden is None else context.hidden.shape[1]
        self.num_rows, self.layout, self.rows = num_rows, None, {}
        self.context = DeviceContext(target, request, num_rows, capacity, hidden)
        self._session = None if session is None or shape == PLAIN else session.on_device(self.context, shape.tree)
        self._state = None if self._session is None else self._session.state
        self._rule, self._tree = rule, shape.tree
        self._round = Recorded(self._run, target.device, target.graph_pool, f"a round of {target.name}")

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
        """Hand back what the host does not hear round by round, or does not write down. Behind the end of a text may lie anything."""
        self.context.unload(context, list(self.rows))

    def launch(self) -> Reply:
        """Run one round of all rows."""
        return Reply(self._round())

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
        return context.target.forward_rows(context.sequences, draft.tokens, draft.tree, hidden=context.hidden is not None)

    def accept(self, draft: Draft, out: RunnerOutput) -> tuple[Acceptance, Tensor, Tensor, Layout]:
        """See `judge`."""
        return judge(self.context, self._rule, draft, out.logits, out.hidden, self.context.rows)

    @torch.inference_mode()
    def _run(self) -> Tensor:
        self.context.begin()
        draft = self.draft()
        verdict, emitted, answer, self.layout = self.accept(draft, self.verify(draft))
        self.context.advance(draft, verdict, emitted)
        return answer


class Recordings:
    """The rounds that a generator has recorded, and whether a call can be run with them."""

    KEPT = 32

    def __init__(self, target: ModelRunner):
        self._target, self._shelf = target, Shelf(self.KEPT)

    def forget(self) -> None:
        """Drop them all: called by the runners whose models they run."""
        self._shelf.clear()

    def obstacle(self, session: DraftSession | None, request: Request, policy: Policy) -> str | None:
        """Why the host must take part in every round of this call; None: it need not."""
        if self._target.mode == "eager":
            return 'the target runs with mode="eager"'
        if not isinstance(policy, Fixed):
            return "the shape of each round is chosen from what the rounds before gave"
        if session is not None and not getattr(session, "runs_on_device", False):
            return f"a {type(session).__name__} asks the host in every round"
        if request.processors.ask_host:
            return f"logits processors look at the text or ask the device: {', '.join(request.processors.ask_host)}"
        return None

    def of(self, drafter: Drafter | None, session: DraftSession | None, rule: AcceptanceRule, request: Request, context: DraftContext, shape: Shape,
           count: int, capacity: int) -> DeviceRounds:  # fmt: skip
        """Rounds for `count` rows of up to `capacity` tokens, drafts included, or somewhat more of both. Raises CannotRecord."""
        num_rows, capacity = 1 << (count - 1).bit_length(), max(MIN_CAPACITY, 1 << (capacity - 1).bit_length())
        plain = session is None or shape == PLAIN
        own = None if plain else (Itself(drafter), getattr(session, "reads", ()))
        key = (own, shape, num_rows, capacity, Itself(rule), request.do_sample, request.eos, request.processors.signature)
        return self._shelf.get(key, lambda: self._make(session, rule, request, context, shape, num_rows, capacity))

    def _make(self, *arguments) -> DeviceRounds:
        rounds = DeviceRounds(self._target, *arguments)
        for runner in rounds.runners:
            runner.readers.add(self)
        return rounds
