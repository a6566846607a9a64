"""Rounds that run without the host: draft, verify, accept and commit as one function of tensors, which a CUDA graph replays.

The host launches a round before it has read what the one before gave; what a round did is read one round late, from one small tensor. Rows
end on the device at their limit and at end-of-text tokens. A row that the host ends (a stopping criterion) is told so, and what it drafted
meanwhile is forgotten.
"""

from specdec.acceptance import AcceptanceRule
from specdec.cuda_graph import Itself, Shelf
from specdec.drafters import Drafter, DraftSession
from specdec.model.runner import ModelRunner
from specdec.planning.policy import PLAIN, Fixed, Policy, Shape
from specdec.requests.request import Request
from specdec.requests.rows import DraftContext
from specdec.rounds.round import DeviceRounds

MIN_CAPACITY = 512  # tokens of a row that a recording has room for, then the next powers of two: texts of similar length share one


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
