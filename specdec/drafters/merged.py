"""Two drafters' guesses in one tree: verified together, they cost one forward."""

from collections.abc import Sequence

import torch

from specdec.drafters.base import Drafter, DrafterTraits, DraftSession
from specdec.drafters.paths import merge_paths, paths_of
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree


class MergedDrafter:
    """The tree of `first`, then what `second` adds to it, in at most `num_tokens` nodes (None: room for both).

    Equal paths share their nodes. Both must choose their tokens deterministically (prompt lookup, a dynamic tree, a
    `ModelDrafter` with `sample=False`): drawn tokens would have to be verified with the distribution of both at once.
    Raises ValueError for others."""

    def __init__(self, first: Drafter, second: Drafter, num_tokens: int | None = None):
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self.first, self.second = first, second
        both = first.traits, second.traits
        if None not in (wanted := [traits.features for traits in both]) and wanted[0] != wanted[1]:
            raise ValueError(f"merged drafters must read the same features, got {wanted[0]} and {wanted[1]}")
        self.traits = DrafterTraits(
            sum(traits.max_tokens for traits in both) if num_tokens is None else num_tokens,
            target_tokens=max(traits.target_tokens for traits in both),
            captured=all(traits.captured for traits in both),
            features=both[0].features or both[1].features,
        )

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless both fit."""
        self.first.validate(target)
        self.second.validate(target)

    def start(self, rows: Rows, max_tokens: int) -> "MergedSession":
        """Begin with both."""
        sessions: list[DraftSession] = []
        try:
            for drafter in (self.first, self.second):
                sessions.append(drafter.start(rows, drafter.traits.max_tokens))
        except Exception:
            for session in sessions:
                session.release(rows.members)
            raise
        return MergedSession(sessions, self.traits.max_tokens)


class MergedSession:
    """One call of both."""

    def __init__(self, sessions: Sequence[DraftSession], num_tokens: int):
        self._sessions, self._num_tokens = sessions, num_tokens
        self.states = tuple(state for session in sessions for state in session.states)

    @property
    def reads(self) -> tuple[int, ...]:
        """What both read."""
        return tuple(address for session in self._sessions for address in session.reads)

    def min_length(self, tree: TokenTree | None) -> int:
        """Enough for both."""
        return max(session.min_length(None) for session in self._sessions)

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """Both proposals, merged."""
        drafts = [session.propose(batch) for session in self._sessions]
        if any(draft.probs is not None for draft in drafts):
            raise ValueError(
                "merged drafters must choose their tokens deterministically (ModelDrafter: sample=False), "
                "but one drew them at random"
            )
        pieces = [paths_of(draft) for draft in drafts]
        deepest = max(draft.max_depth for draft in drafts)
        if deepest == 0:
            return Draft(TokenTree.chain(0), batch.last_tokens())
        paths = torch.cat([torch.nn.functional.pad(paths, (0, deepest - paths.shape[2])) for paths, _, _ in pieces], 1)
        depths, exists = (torch.cat([piece[i] for piece in pieces], 1) for i in (1, 2))
        branches = sum(_most_children(draft) for draft in drafts)
        return merge_paths(batch.last_tokens(), paths, depths, exists, self._num_tokens, branches)

    def commit(self, batch: Batch, paths: Sequence[Sequence[int]]) -> None:
        """Neither knows which of the accepted nodes were its own, so both keep none."""
        for session in self._sessions:
            session.commit(batch, [()] * batch.size)

    def release(self, rows: Sequence[Row]) -> None:
        """Release both."""
        for session in self._sessions:
            session.release(rows)


def _most_children(draft: Draft) -> int:
    return draft.tree.max_children if isinstance(draft.tree, TreeBatch) else max(map(len, draft.tree.children))
