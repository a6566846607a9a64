"""A request that was submitted, as its user sees it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from specdec.planning.policy import Shape
from specdec.report.stats import RoundStats
from specdec.requests.request import Request
from specdec.requests.rows import Row
from specdec.rounds.records import Record

Callback = Callable[["Handle", list[int]], None]


@dataclass(slots=True, eq=False)
class Handle:
    """One request; the engine writes to it.

    id: the user's, or a number.
    request: the checked prompt and settings.
    priority: larger ones come first.
    arrival: its place in the order of submissions.
    callback: called with the handle and the new tokens after each of its rounds.
    options: what else `submit` was given.
    reason: why it has finished: "end" (an end-of-text token), "stop" (a stopping criterion), "length", "cancelled",
        "interrupted" (Ctrl-C) or "error" (None: it has not).
    error: what ended it, an exception of its own processors, criteria or callback, say.
    record: tokens and rounds so far.
    row: its row while it runs.
    preemptions: how often it had to make room.
    """

    id: Hashable
    request: Request
    priority: int
    arrival: int
    tokenizer: object = None
    callback: Callback | None = None
    options: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    error: Exception | None = None
    record: Record = field(default_factory=Record)
    row: Row | None = None
    preemptions: int = 0

    @property
    def prompt(self) -> list[int]:
        """Its tokens."""
        return self.request.prompts[0].tolist()

    @property
    def length(self) -> int:
        """Tokens of its prompt and new ones so far."""
        return len(self.request.prompts[0]) + len(self.record.new_tokens)

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far, a final end-of-text token included."""
        return list(self.record.new_tokens)

    @property
    def text(self) -> str:
        """The new tokens as text. Raises ValueError for an engine without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("handle.text needs Engine(tokenizer=…)")
        return self.tokenizer.decode(self.record.new_tokens, skip_special_tokens=True)  # type: ignore[attr-defined]

    @property
    def logprobs(self) -> list[float]:
        """The natural logarithm of each new token's probability: the softmax of the target's logits, before processors.

        Temperature, top-k, penalties and the like do not change it. Raises ValueError without `submit(logprobs=True)`.
        """
        if "logprobs" not in self.request.outputs:
            raise ValueError("handle.logprobs needs submit(logprobs=True)")
        return list(self.record.logprobs)

    @property
    def finished(self) -> bool:
        """Whether no further token will come."""
        return self.reason is not None

    @property
    def stats(self) -> RoundStats:
        """Its rounds so far: proposed, accepted and emitted tokens, and the shape of each round's draft."""
        return self.record.stats(None)

    @property
    def shapes(self) -> list[Shape]:
        """Those of its rounds' drafts, with which and its seed `SpeculativeGenerator.generate` repeats its text."""
        return list(self.record.shapes)

    @property
    def limit(self) -> int:
        """The length at which it ends, prompt included."""
        return self.request.limits[0]
