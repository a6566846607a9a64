"""The protocol of a drafter, and what it may read while it proposes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specdec.model.runner import ModelRunner
from specdec.sampling.draws import highest
from specdec.sampling.noise import RoundNoise, round_noise
from specdec.sampling.processors import Processors
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


@dataclass(slots=True)
class DraftContext:
    """The state of one `generate` call, written by the loop and read by drafters. Row numbers are those of the user's batch.

    `tokens [B, capacity]` holds each row's prompt and accepted tokens; the first `lengths[row]` of them are valid, and `news[row]` are the
    last round's as a list; those of rounds that run without the host are in `tokens` only after the last of them. `limits[row]` is the length at
    which a row ends; `sequences[row]` its sequence in the target's cache.

    A drafter that sets `wants_hidden` when it starts finds, from a call's second round on, `hidden [B, H]`: what the target's output layer
    read at the node that each row's last token was drawn from.
    """

    target: ModelRunner
    tokens: Tensor
    lengths: list[int]
    limits: list[int]
    rounds: list[int]
    processors: Processors
    do_sample: bool
    seed: int
    sequences: dict[int, int]
    news: list[list[int]]
    complaints: list[tuple[Tensor, str]] = field(default_factory=list)
    wants_hidden: bool = False
    hidden: Tensor | None = None

    @classmethod
    def of(cls, target: ModelRunner, request) -> "DraftContext":
        """The state in which a call with this `specdec.requests.request.Request` begins; no row has a sequence in the cache yet."""
        tokens = torch.zeros(len(request.prompts), max(request.limits), dtype=torch.int64, device=target.device)
        for row, prompt in enumerate(request.prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = [len(prompt) for prompt in request.prompts]
        return cls(target, tokens, lengths, request.limits, [0] * len(lengths), request.processors, request.do_sample, request.seed, {}, [[] for _ in lengths])

    def noise(self, rows: Sequence[int]) -> RoundNoise:
        """The random numbers of the current round of `rows`."""
        return round_noise(self.seed, rows, [self.rounds[row] for row in rows], self.tokens.device)

    def lengths_before(self, rows: Sequence[int]) -> list[int]:
        """The length of each row before the last round."""
        return [self.lengths[row] - len(self.news[row]) for row in rows]

    def last_tokens(self, rows: Sequence[int]) -> Tensor:
        """`[A, 1]`: the last accepted token of each row."""
        where = torch.tensor([[row, self.lengths[row] - 1] for row in rows], dtype=torch.int64).to(self.tokens.device, non_blocking=True)
        return self.tokens[where[:, 0], where[:, 1]][:, None]

    def text(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`[A, L]`: the tokens of each row, which begin with those that are valid, and `[A, 1]`: how many these are."""
        chosen = torch.tensor([[row, self.lengths[row]] for row in rows]).to(self.tokens.device, non_blocking=True)
        return self.tokens[chosen[:, 0], : max(self.lengths[row] for row in rows)], chosen[:, 1:]

    def keep_hidden(self, hidden: Tensor, rows: Sequence[int]) -> None:
        """Remember `hidden [A, H]` for the next round."""
        if self.hidden is None:
            self.hidden = hidden.new_zeros(len(self.lengths), hidden.shape[1])
        self.hidden[torch.tensor(rows).to(hidden.device, non_blocking=True)] = hidden

    def hidden_of(self, rows: Sequence[int]) -> Tensor | None:
        """`[A, H]`, or None in a call's first round."""
        return None if self.hidden is None else self.hidden[torch.tensor(rows).to(self.hidden.device, non_blocking=True)]

    def complain(self, about: Tensor, what: str) -> None:
        """Report, without waiting for the device, `about` which rows of this round are broken; the loop raises ValueError.

        Either which they are, `[A]` bool, or numbers `[A, n]` that break their row unless they are all finite.
        """
        self.complaints.append((about, what))

    def process(self, logits: Tensor, rows: Sequence[int], path: Callable[[int, int], Tensor], whose: str, going: Tensor | None = None) -> Tensor:
        """Scores `[A, n, V]` of n nodes in each of `rows`: `logits` through the processors; `path(a, i) [d]` are the drafted tokens before.

        `going [A, n]` bool: nodes behind which a text can go on (None: all), see `Processors.may_follow`. Processors that look at the text never
        hear of the others, nor of what lies behind a row's limit: their scores are -inf. So is every score where the processors leave no token:
        nothing can be drafted there. Broken logits of `whose` model, and scores that are NaN or infinite, are complained about.
        """
        return process(self, logits, rows, path, whose, going)


def process(context: DraftContext, logits: Tensor, rows: Sequence[int], path: Callable[[int, int], Tensor], whose: str,
            going: Tensor | None = None) -> Tensor:  # fmt: skip
    """See `DraftContext.process`."""
    context.complain(highest(logits), f"the {whose} model produced NaN or infinite logits")
    nodes, processors, asked = logits.shape[1], context.processors, None
    if processors.need_prefix:
        room = [context.limits[row] - context.lengths[row] for row in rows]
        places = [(a, i) for a in range(len(rows)) for i in range(nodes)]
        asked = [len(path(a, i)) < room[a] for a, i in places]
        if going is not None:
            asked = [a and b for a, b in zip(asked, going.flatten().tolist(), strict=True)]

    def prefix(m):
        a, node = divmod(m, nodes)
        return torch.cat([context.tokens[rows[a], : context.lengths[rows[a]]], path(a, node)])[None]

    scores = processors(logits.flatten(0, 1), [row for row in rows for _ in range(nodes)], prefix, asked).unflatten(0, (len(rows), nodes))
    if processors.change_scores:
        largest = highest(scores)  # -inf is no fault: nothing is drafted there
        about = torch.where(largest == float("-inf"), 0.0, largest)
        context.complain(about, f"the logits processors (or the temperature) left the {whose} model no finite score")
    return scores


class DraftSession(Protocol):
    """A drafter at work on one `generate` call."""

    def propose(self, rows: Sequence[int], tree: TokenTree | None = None) -> Draft:
        """A draft for the active `rows`: node 0 of each is its last accepted token. `tree`: the shape wanted; None leaves it to the drafter."""

    def commit(self, rows: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Hear which nodes of each row of the last proposal stay, from depth 1 on. Rounds without a proposal pass unheard."""

    def release(self, rows: Sequence[int]) -> None:
        """Forget rows that have ended; also called, with all rows left, when the call ends or fails."""

    # Optional, for rounds that run without the host: `runs_on_device` (False without it), `state`, what the session keeps in a draft model's
    # cache (a `ModelState`, or None for nothing), `on_device(context: DeviceContext, tree: TokenTree | None) -> DeviceSession`, and `reads`, where
    # in memory weights of its own lie, of which recordings know nothing else (`()` without it).


def is_drafter(given) -> bool:
    """Whether something has the methods of a `Drafter`."""
    return not isinstance(given, type) and all(callable(getattr(given, name, None)) for name in ("validate", "start"))


def require_drafter(drafter) -> None:
    """Raise TypeError for what is no drafter: a model, say."""
    if not is_drafter(drafter):
        given = drafter if isinstance(drafter, type | str | None) else type(drafter).__name__
        raise TypeError(f"a drafter is wanted, such as specdec.ModelDrafter(model), got {given!r}")


class DeviceSession(Protocol):
    """A drafter at work in rounds that the host does not look into: `propose` reads a `DeviceContext` and leaves no decision to Python."""

    state: object | None  # a `DeviceModelState` that takes up, in the draft model's cache, what the host's session kept there; None: nothing

    def propose(self, rows: Sequence[int], tree: TokenTree | None = None) -> Draft:
        """As `DraftSession.propose`, for all rows of the context at once."""


class Drafter(Protocol):
    """Anything that proposes. A drafter without state of its own may return itself from `start`."""

    max_tokens: int  # nodes of its own largest tree, without the root
    shapes: str  # what `propose` can be asked for: "tree" (any), "chain" (any length), or "own" (its own shape only)
    # Optional: `max_depth`, that of the deepest tree it can be asked for (no limit without), and `target_tokens`, how many tokens it runs
    # in the target's own cache (none without).

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError, naming the values, when this drafter cannot draft for `target`."""

    def start(self, context: DraftContext, max_tokens: int) -> DraftSession:
        """Begin to draft for one `generate` call, in which no tree is larger than `max_tokens` nodes without the root."""
