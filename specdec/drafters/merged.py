"""Two drafters' proposals in one tree, verified by one forward."""

from collections.abc import Sequence

import torch

from specdec.drafters.base import Drafter, DrafterTraits, DraftSession
from specdec.drafters.paths import merge_paths, paths_of
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


class MergedDrafter:
    """The tree of `first`, then what `second` adds to it, in at most `num_tokens` nodes (None: room for both).

    Equal paths share their nodes. Both must choose their tokens deterministically (prompt lookup, a dynamic tree, a
    `ModelDrafter` with `sample=False`), since the joint distribution of drawn tokens is not known; raises ValueError
    for others."""

    def __init__(self, first: Drafter, second: Drafter, num_tokens: int | None = None):
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self.first, self.second = first, second
        both = first.traits, second.traits
        if None not in (wanted := [traits.features for traits in both]) and wanted[0] != wanted[1]:
            raise ValueError(f"merged drafters must read the same features, got {wanted[0]} and {wanted[1]}")
        longest = [traits.max_length for traits in both if traits.max_length is not None]
        self.traits = DrafterTraits(
            sum(traits.max_tokens for traits in both) if num_tokens is None else num_tokens,
            target_tokens=max(traits.target_tokens for traits in both),
            captured=first is not second and all(traits.captured for traits in both),
            features=both[0].features or both[1].features,
            own_depth=max(traits.own_depth or traits.max_tokens for traits in both),
            own_tokens=max(max(traits.max_tokens, traits.own_tokens) for traits in both),
            max_length=max(longest) if len(longest) == 2 else None,
            runs_again=max(traits.runs_again for traits in both),
        )

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless both can draft for `target`."""
        self.first.validate(target)
        self.second.validate(target)

    def start(self, rows: Rows, max_tokens: int) -> "MergedSession":
        """Start both drafters."""
        sessions: list[DraftSession] = []
        try:
            for drafter in (self.first, self.second):
                sessions.append(drafter.start(rows, drafter.traits.max_tokens))
        except Exception:
            for session in sessions:
                session.release(rows.members)
            raise
        return MergedSession(sessions, self.traits.max_tokens, self.traits.own_depth or self.traits.max_tokens)


class MergedSession:
    """One call of a `MergedDrafter`."""

    def __init__(self, sessions: Sequence[DraftSession], num_tokens: int, depth: int):
        self._sessions, self._num_tokens, self._depth = sessions, num_tokens, depth
        self.states = tuple(state for session in sessions for state in session.states)

    @property
    def reads(self) -> tuple[int, ...]:
        """See `DraftSession.reads`: those of both."""
        return tuple(address for session in self._sessions for address in session.reads)

    def min_length(self, tree: TokenTree | None) -> int:
        """See `DraftSession.min_length`: enough for both, and for the longest path that either may have accepted."""
        return max(self._depth + 1, *(session.min_length(None) for session in self._sessions))

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """Merge both proposals."""
        drafts = [session.propose(batch, None) for session in self._sessions]
        if any(draft.probs is not None for draft in drafts):
            raise ValueError("merged drafters must not draw their tokens at random: use ModelDrafter(…, sample=False)")
        pieces = [paths_of(draft) for draft in drafts]
        deepest = max(draft.max_depth for draft in drafts)
        if deepest > self._depth:
            raise ValueError(f"a merged drafter's own_depth is {self._depth}, but a draft has {deepest} levels")
        if deepest == 0:
            return Draft(TokenTree.chain(0), batch.last_tokens())
        paths = torch.cat([torch.nn.functional.pad(paths, (0, deepest - paths.shape[2])) for paths, _, _ in pieces], 1)
        depths, exists = (torch.cat([piece[i] for piece in pieces], 1) for i in (1, 2))
        branches = sum(draft.tree.max_children for draft in drafts)
        return merge_paths(batch.last_tokens(), paths, depths, exists, self._num_tokens, branches)

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`."""
        for session in self._sessions:
            session.admit(rows, joining)

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Let both drop all drafted nodes, as neither knows which of the accepted ones were its own."""
        for session in self._sessions:
            session.commit(batch, [()] * batch.size)

    def release(self, rows: Sequence[Row]) -> None:
        """See `DraftSession.release`."""
        for session in self._sessions:
            session.release(rows)
