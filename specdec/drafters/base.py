"""The protocols of a drafter, of its session during a call, and of its state in a draft model's cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from specdec.model.feature_runner import FeatureRunner
from specdec.model.features import Features
from specdec.model.prefill import Give
from specdec.model.round_runner import RoundRunner
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.draft import Draft
from specdec.trees.tensors import Tree
from specdec.trees.tree import TokenTree

SHAPES = ("tree", "chain", "own", "grown")
Held = TypeVar("Held")


@dataclass(frozen=True, slots=True)
class DrafterTraits:
    """What the decoding loop needs to know about a drafter.

    max_tokens: nodes of its own largest tree, without the root.
    own_depth: levels of its own deepest tree (None: up to max_tokens).
    shapes: the trees that `propose` accepts: "tree" (any), "chain" (of any length), "own" (its own shape only) or
        "grown" (its own, as large as it is asked to be, see `Batch.nodes`).
    max_depth: of the trees that `propose` accepts (None: no limit).
    target_tokens: tokens that it runs in the target's own cache.
    own_tokens: tokens that a draft may take in a cache of its own, where these are more than max_tokens.
    captured: whether `propose` can be captured in a CUDA graph, because it only reads tensors of the batch.
    max_length: tokens of the longest text that it drafts for (None: no limit). Once all texts are longer, captured
        rounds are plain steps; see `drafters.reach` for a batch of which some rows are.
    features: the hidden states that it reads (None: none): those of the last token from `Batch.features`, or, with
        tokens "prompt", those of every token of a text, which a `FeatureReader` gets.
    tree: its own, where that is the same for all rows.
    runs_again: tokens before the last accepted ones whose features rounds keep too, because they run again.

    Raises ValueError for a bad value."""

    max_tokens: int
    shapes: str = "own"
    max_depth: int | None = None
    target_tokens: int = 0
    captured: bool = False
    features: Features | None = None
    own_depth: int | None = None
    max_length: int | None = None
    tree: TokenTree | None = None
    own_tokens: int = 0
    runs_again: int = 0

    def __post_init__(self):
        levels = [depth for depth in (self.max_depth, self.own_depth) if depth is not None]
        if min(self.max_tokens, *levels, self.target_tokens + 1, self.own_tokens + 1) < 1:
            raise ValueError(
                f"max_tokens, max_depth and own_depth must be at least 1, target_tokens and own_tokens at least 0, "
                f"got {self.max_tokens}, {self.max_depth}, {self.own_depth}, {self.target_tokens} and "
                f"{self.own_tokens}"
            )
        if self.features is not None and self.features.tokens == "accepted":
            raise ValueError(f'rounds keep features of the "last" token or of all ("prompt"), got {self.features}')
        if self.shapes not in SHAPES:
            raise ValueError(f"shapes must be one of {', '.join(SHAPES)}, got {self.shapes!r}")

    @property
    def deepest(self) -> int:
        """Levels of the deepest draft that rounds may have."""
        most = self.max_tokens if self.max_depth is None else self.max_depth
        return max(self.own_depth or self.max_tokens, 0 if self.shapes in ("own", "grown") else most)

    @property
    def feature_room(self) -> int:
        """Tokens of each row whose features rounds keep (`Rows.features`): the last one, or all that a round adds."""
        return 1 if self.features is None or self.features.tokens == "last" else self.deepest + 1 + self.runs_again


class FeatureReader(Protocol):
    """The part of a `DraftState` that reads the target's features of every token of a text, "prompt" ones.

    Its sequences never fall behind: of chunks of prompts it is given the features as they are computed, and every
    round, a plain one too, begins with those that the round before has left in `Rows.features`. So it needs no token
    whose features are gone, and a text may go on without drafts, and with them again, at any time."""

    @property
    def reads(self) -> tuple[int, ...]:
        """See `DraftSession.reads`."""

    @property
    def min_length(self) -> int:
        """See `DraftSession.min_length`: a captured round runs all that `Rows.features` holds again."""

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that there can be a draft for; see `drafters.reach`."""

    def take_in(self, rows: Rows, members: Sequence[Row], features: Sequence[Tensor]) -> None:
        """The target has run the next tokens of `members` outside a draft, of which these are the features `[n, W]`."""

    def keep_up(self, batch: Batch) -> None:
        """Run what the sequences lack, at the begin of a round, of rows without a draft."""


class DraftState(Protocol):
    """The rows' sequences in a draft model's cache."""

    @property
    def runner(self) -> RoundRunner:
        """The draft model and its cache."""

    @property
    def draft_room(self) -> int:
        """Tokens of its own that captured rounds append past those of a row."""

    @property
    def reader(self) -> FeatureReader | None:
        """The state itself, if it reads features of all tokens; None: it reads tokens, as a language model does."""

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""

    def catch_up(self, batch: Batch) -> Tensor:
        """Run the accepted tokens that the cache lacks -> logits `[A, V]` after each row's last token.

        A captured round, which cannot know how many these are, always runs the last `Batch.most_new` tokens."""

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Run what the cache lacks of the text of `members` but the last token; captured rounds go on from there."""

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """Run drafted nodes `tokens [A, n]` -> logits `[A, n, V]`.

        `tree`: of all nodes run so far, the root included (None: a chain).
        `above`: the parent of each node among those of the last run (of `catch_up`: the root), `[n]` or `[A, n]`."""

    def end_proposal(self, batch: Batch) -> None:
        """Called when the proposal is complete, before the target runs."""

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Keep at most the first `lengths` tokens of each row."""

    def pages_wanted(self, row: Row) -> int:
        """How many further pages of `runner.cache` the next round of `row` may take."""

    def prefix_sequence(self, row: Row) -> int | None:
        """The row's sequence, where it holds the row's tokens one for one and its prefix may be shared; else None."""

    def with_pages(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
        """The sequences of `rows`, with pages for texts of `lengths` tokens and what captured rounds append to them."""

    def release(self, rows: Sequence[Row]) -> None:
        """Free the pages of rows that have ended."""


class DraftSession(Protocol):
    """A drafter during one `generate` call, or for the requests of an engine that are sampled alike."""

    @property
    def states(self) -> Sequence[DraftState]:
        """The states of its draft models, if any."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Addresses of weights that the session itself reads; when they change, rounds are captured again."""

    def propose(self, batch: Batch, tree: TokenTree | None, /) -> Draft:
        """A draft for the rows of `batch`, of the shape `tree` (None: the drafter's own).

        Node 0 of each row is its last accepted token."""

    def min_length(self, tree: TokenTree | None) -> int:
        """Tokens that a row must have before its rounds can be captured: what these run again (`Batch.most_new`)."""

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """Begin to draft for rows that join `rows` after the start."""

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Take note of the accepted nodes `paths[a]`, from depth 1 on, of row a's last proposal.

        Not called after rounds without a proposal or captured rounds."""

    def release(self, rows: Sequence[Row]) -> None:
        """Drop rows that have ended; at the end of the call, or when it fails, all that are left."""


@dataclass(frozen=True, slots=True)
class StatelessSession:
    """A `DraftSession` that keeps nothing between rounds: only `propose(batch, tree)`, and `DraftSession.reads`."""

    propose: Callable[[Batch, TokenTree | None], Draft]
    reads: tuple[int, ...] = ()
    states: tuple[DraftState, ...] = ()

    def min_length(self, tree: TokenTree | None) -> int:
        """One token: rounds after any text can be captured."""
        return 1

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """Do nothing: nothing is kept for a row."""

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Do nothing: `propose` reads the accepted tokens from the batch."""

    def release(self, rows: Sequence[Row]) -> None:
        """Do nothing: rows hold no memory here."""


@runtime_checkable
class Drafter(Protocol):
    """Anything that proposes; one that keeps nothing between rounds starts a `StatelessSession`."""

    traits: DrafterTraits

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError, naming the values, if this drafter cannot draft for `target`."""

    def start(self, rows: Rows, max_tokens: int) -> DraftSession:
        """Begin one `generate` call, whose trees have at most `max_tokens` nodes without the root."""


def is_drafter(given) -> bool:
    """Whether an object has the members of a `Drafter`."""
    return not isinstance(given, type) and isinstance(given, Drafter)


def readers_of(session: DraftSession | None) -> list[FeatureReader]:
    """The states of a session that read the features of every token."""
    return [state.reader for state in (session.states if session is not None else ()) if state.reader is not None]


def take_in(session: DraftSession | None, rows: Rows, members: Sequence[Row], features: Sequence[Tensor]) -> None:
    """Give the features `[n, W]` of the next tokens of `members` to what reads those of every token, and keep the last.

    The target has run these tokens outside a draft: they are of prompts, or of what comes before a draft's root."""
    readers = readers_of(session)
    for reader in readers:
        reader.take_in(rows, members, features)
    for row, of_row in zip(members, features, strict=True) if readers else ():
        if len(of_row):
            rows.add_features(row, of_row)


def prompt_reader(session: DraftSession | None, rows: Rows) -> Give | None:
    """`take_in` for the members of `rows`, as `prefill.extend` calls it; None if nothing reads all features."""
    if not readers_of(session):
        return None
    return lambda places, features: take_in(session, rows, [rows.members[place] for place in places], features)


def token_states(session: DraftSession | None) -> list[DraftState]:
    """The states of a session that read tokens: in rounds without a draft they fall behind, and see the text later."""
    return [state for state in (session.states if session is not None else ()) if state.reader is None]


def held_by(drafter: Drafter | None, *kinds: type[Held]) -> Iterator[Held]:
    """What of `kinds` the attributes of a drafter, and those of its inner drafters, hold."""
    for held in vars(drafter).values() if drafter is not None and hasattr(drafter, "__dict__") else ():
        if isinstance(held, kinds):
            yield held
        elif is_drafter(held):
            yield from held_by(held, *kinds)


def runners_of(drafter: Drafter | None) -> Iterator[RoundRunner]:
    """The runners that are attributes of a drafter, and those of its inner drafters."""
    return held_by(drafter, ModelRunner, FeatureRunner)


def runners_elsewhere(drafter: Drafter | None, target: ModelRunner) -> list[RoundRunner]:
    """The runners of a drafter that run on another device than the target."""
    return [runner for runner in runners_of(drafter) if runner.device != target.device]


def require_drafter(drafter) -> None:
    """Raise TypeError for an object that is no drafter, such as a model, naming what it lacks."""
    if not is_drafter(drafter):
        given = drafter if isinstance(drafter, type | str | None) else type(drafter).__name__
        missing = [name for name in ("traits", "validate", "start") if not hasattr(drafter, name)]
        lacks = f", which lacks {', '.join(missing)}" if 0 < len(missing) < 3 else ""
        raise TypeError(f"drafter must be a Drafter, such as specdec.ModelDrafter(model), got {given!r}{lacks}")


def require_session(session, drafter) -> None:
    """Raise TypeError unless `session`, which `drafter` has started, is one."""
    members = "states", "reads", "propose", "min_length", "admit", "commit", "release"
    if not all(hasattr(session, name) for name in members):
        raise TypeError(
            f"{type(drafter).__name__}.start must return a DraftSession, such as StatelessSession(self.propose), got a "
            f"{type(session).__name__}"
        )
