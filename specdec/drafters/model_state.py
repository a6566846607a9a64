"""The rows' sequences in a draft model's own cache."""

from collections.abc import Sequence

from torch import Tensor

from specdec.drafters.base import DraftState
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree


class ModelState:
    """A `DraftState` whose sequences hold a prefix of their row's accepted tokens and, in a round, drafted nodes."""

    def __init__(self, runner: ModelRunner, rows: Rows, max_tokens: int):
        limit, longest = runner.max_positions, max(row.limit for row in rows.members)
        if limit is not None and longest > limit:
            raise ValueError(f"the draft model has {limit} positions, but prompt + max_new_tokens reach {longest}")
        self.runner, self.draft_room = runner, max_tokens
        runner.match_mode(rows.target)
        runner.reserve([row.limit + max_tokens for row in rows.members])
        self._sequences = {row.number: runner.cache.add() for row in rows.members}

    def catch_up(self, batch: Batch, anew: int) -> Tensor:
        """See `DraftState.catch_up`."""
        if batch.captured:
            return run_anew(self, batch, max(anew, batch.most_new))
        sequences = self._of(batch.members)
        return self.runner.extend(sequences, unseen(self.runner, batch, sequences))

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None) -> Tensor:
        """See `DraftState.run`."""
        return run_nodes(self, batch, self._of(batch.members), tokens, tree)

    def end_proposal(self, batch: Batch) -> None:
        """Do nothing: drafted nodes stay until `truncate`."""

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """See `DraftState.truncate`."""
        cache = self.runner.cache
        for sequence, length in zip(self._of(rows), lengths, strict=True):
            cache.truncate(sequence, min(cache.length(sequence), length))

    def with_all_pages(self, rows: Sequence[Row]) -> list[int]:
        """See `DraftState.with_all_pages`."""
        sequences, cache = self._of(rows), self.runner.cache
        limits = [row.limit + self.draft_room for row in rows]
        cache.append(sequences, [max(0, limit - cache.length(s)) for s, limit in zip(sequences, limits, strict=True)])
        return sequences

    def release(self, rows: Sequence[Row]) -> None:
        """See `DraftState.release`."""
        for row in rows:
            self.runner.cache.free(self._sequences.pop(row.number))

    def _of(self, rows: Sequence[Row]) -> list[int]:
        return [self._sequences[row.number] for row in rows]


def unseen(runner: ModelRunner, batch: Batch, sequences: Sequence[int]) -> list[Tensor]:
    """The accepted tokens `[n]` of each row that its sequence lacks."""
    tokens, cache = batch.rows.tokens, runner.cache
    pairs = zip(batch.members, sequences, strict=True)
    return [tokens[row.slot, cache.length(sequence) : row.length] for row, sequence in pairs]


def run_anew(state: DraftState, batch: Batch, count: int) -> Tensor:
    """Run the last `count` accepted tokens of all rows in a captured round -> logits `[B, V]` after the last one."""
    memory = batch.rows.memory(state.runner, state.draft_room)
    memory.lengths.copy_(batch.rows.lengths - count)
    return state.runner.forward_rows(memory, batch.recent(count), last_only=True).logits[:, 0]


def run_nodes(state: DraftState, batch: Batch, sequences: Sequence[int], tokens: Tensor,
              tree: Tree = None) -> Tensor:  # fmt: skip
    """See `DraftState.run`; `sequences` are the rows' own, which captured rounds ignore."""
    if batch.captured:
        memory = batch.rows.memory(state.runner, state.draft_room)
        return state.runner.forward_rows(memory, tokens, tree).logits
    count = tokens.shape[1]
    out = state.runner.forward(sequences, tokens.flatten(), [count] * len(sequences), tree=tree)
    return out.logits.unflatten(0, (-1, count))


def require_same(draft: ModelRunner, target: ModelRunner, *, vocabulary: bool = True) -> None:
    """Raise ValueError unless the draft model fits `target`."""
    compared = [("device", draft.device, target.device), ("dtype", draft.dtype, target.dtype)]
    if vocabulary:
        compared.insert(0, ("vocabulary size", draft.vocab_size, target.vocab_size))
    for what, ours, theirs in compared:
        if ours != theirs:
            raise ValueError(
                f"draft and target model must have the same {what}, got {ours} for the draft and {theirs} for the "
                "target"
            )
