"""The sequences of one `generate` call in a draft model's cache."""

from collections.abc import Sequence

from torch import Tensor

from attention.paged.device_batch import DeviceSequences
from specdec.model.runner import ModelRunner
from specdec.requests.rows import DeviceContext, DraftContext
from specdec.trees.tree import TokenTree


class ModelState:
    """Between rounds a sequence holds a prefix of its row's accepted tokens; during one, the drafted nodes behind the
    root too.
    """

    asks_host = True

    def __init__(self, runner: ModelRunner, context: DraftContext, max_tokens: int):
        limit = runner.max_positions
        if limit is not None and max(context.limits) > limit:
            raise ValueError(
                f"the draft model has {limit} positions, but prompt + max_new_tokens reach {max(context.limits)}"
            )
        self.runner, self._context, self._max_tokens = runner, context, max_tokens
        runner.match_mode(context.target)  # whatever mode it was made in
        runner.reserve([length + max_tokens for length in context.limits])
        self._sequences = {row: runner.cache.add() for row in range(len(context.lengths))}

    def catch_up(self, rows: Sequence[int]) -> Tensor:
        """Run the accepted tokens that the cache has not seen (the prompt, the last round's) -> logits `[A, V]` after
        the last one.
        """
        context, cache = self._context, self.runner.cache
        sequences = [self._sequences[row] for row in rows]
        unseen = [
            context.tokens[row, cache.length(s) : context.lengths[row]] for row, s in zip(rows, sequences, strict=True)
        ]
        return self.runner.extend(sequences, unseen)

    def run(self, rows: Sequence[int], tokens: Tensor, tree: TokenTree | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Run further nodes `tokens [A, n]` -> logits `[A, n, V]`. `tree` has all nodes so far, root included; None: a
        chain.
        """
        return run_nodes(self.runner, [self._sequences[row] for row in rows], tokens, tree)

    def rest(self, rows: Sequence[int]) -> None:
        """A proposal is done; what it ran stays until `keep`."""

    def keep(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Drop all but the first `lengths` tokens of each row, or all it has."""
        cache = self.runner.cache
        for row, length in zip(rows, lengths, strict=True):
            sequence = self._sequences[row]
            cache.truncate(sequence, min(cache.length(sequence), length))

    def release(self, rows: Sequence[int]) -> None:
        """Give the rows' pages back."""
        for row in rows:
            self.runner.cache.free(self._sequences.pop(row))

    def on_device(self, context: DeviceContext, width: int) -> "DeviceModelState":
        """For rounds that run without the host, of which none adds more than `width` tokens that the cache lacks."""
        return DeviceModelState(self.runner, context, width, context.sequences.capacity + self._max_tokens)

    def grown(self, rows: Sequence[int]) -> list[int]:
        """The sequences of `rows`, each with pages for all that may come."""
        sequences, cache = [self._sequences[row] for row in rows], self.runner.cache
        limits = [self._context.limits[row] + self._max_tokens for row in rows]
        cache.append(sequences, [max(0, limit - cache.length(s)) for s, limit in zip(sequences, limits, strict=True)])
        return sequences


class DeviceModelState:
    """`ModelState` for rounds that run without the host. It does not know how much of the last round its cache has
    kept, so it runs the last `width` accepted tokens anew: as many as a round may add that the cache lacks. Until a row
    has that many tokens the host runs the rounds. `capacity`: tokens that a row may come to have, all that is drafted
    included."""

    asks_host = False

    def __init__(self, runner: ModelRunner, context: DeviceContext, width: int, capacity: int):
        self.runner, self._context, self.width = runner, context, width
        self._rows = DeviceSequences(runner.cache, capacity, context.alive)

    def load(self, state: ModelState, rows: Sequence[int]) -> None:
        """Take up the sequences of `rows`."""
        self._rows.load(state.grown(rows), [0] * len(rows))

    def catch_up(self, rows: Sequence[int]) -> Tensor:
        """Logits `[B, V]` after each row's last token."""
        self._rows.lengths.copy_(self._context.lengths - self.width)
        return self.runner.forward_rows(self._rows, self._context.recent(self.width), last_only=True).logits[:, 0]

    def run(self, rows: Sequence[int], tokens: Tensor, tree: TokenTree | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """See `ModelState.run`."""
        return self.runner.forward_rows(self._rows, tokens, tree).logits

    def rest(self, rows: Sequence[int]) -> None:
        """The next round's `catch_up` begins anew."""


def run_nodes(
    runner: ModelRunner, sequences: Sequence[int], tokens: Tensor, tree: TokenTree | tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Run further nodes `tokens [A, n]` of as many sequences -> logits `[A, n, V]`. `tree` has all nodes so far, root
    included; None: a chain.
    """
    count = tokens.shape[1]
    return runner.forward(sequences, tokens.flatten(), [count] * len(sequences), tree=tree).logits.unflatten(
        0, (-1, count)
    )


def require_same(draft: ModelRunner, target: ModelRunner, *, vocabulary: bool = True) -> None:
    """Raise ValueError unless the draft model fits `target`."""
    compared = [("device", draft.device, target.device), ("dtype", draft.dtype, target.dtype)]
    if vocabulary:
        compared.insert(0, ("vocabulary size", draft.vocab_size, target.vocab_size))
    for what, ours, theirs in compared:
        if ours != theirs:
            raise ValueError(
                f"draft and target model must have the same {what}, got {ours} for the draft and {theirs} "
                "for the target"
            )
