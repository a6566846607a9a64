"""The sequences of one `generate` call in a draft model's cache."""

from collections.abc import Sequence

from torch import Tensor

from specdec.drafters.base import DraftContext
from specdec.runner import ModelRunner
from specdec.tree import TokenTree


class ModelState:
    """Between rounds a sequence holds a prefix of its row's accepted tokens; during one, the drafted nodes behind the root too."""

    def __init__(self, runner: ModelRunner, context: DraftContext, max_tokens: int):
        limit = runner.max_positions
        if limit is not None and max(context.limits) > limit:
            raise ValueError(f"the draft model has {limit} positions, but prompt + max_new_tokens reach {max(context.limits)}")
        self.runner, self._context = runner, context
        runner.reserve([length + max_tokens for length in context.limits])
        self._sequences = {row: runner.cache.add() for row in range(len(context.lengths))}

    def catch_up(self, rows: Sequence[int]) -> Tensor:
        """Run the accepted tokens that the cache has not seen (the prompt, the last round's) -> logits `[A, V]` after the last one."""
        context, cache = self._context, self.runner.cache
        sequences = [self._sequences[row] for row in rows]
        unseen = [context.tokens[row, cache.length(s) : context.lengths[row]] for row, s in zip(rows, sequences, strict=True)]
        return self.runner.extend(sequences, unseen)

    def run(self, rows: Sequence[int], tokens: Tensor, tree: TokenTree | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Run further nodes `tokens [A, n]` -> logits `[A, n, V]`. `tree` has all nodes so far, root included; None: a chain."""
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


def run_nodes(runner: ModelRunner, sequences: Sequence[int], tokens: Tensor, tree: TokenTree | tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Run further nodes `tokens [A, n]` of as many sequences -> logits `[A, n, V]`. `tree` has all nodes so far, root included; None: a chain."""
    count = tokens.shape[1]
    return runner.forward(sequences, tokens.flatten(), [count] * len(sequences), tree=tree).logits.unflatten(0, (-1, count))


def require_width(tree: TokenTree, vocab_size: int) -> None:
    """Raise ValueError for a node with more children than there are tokens."""
    widest = max(map(len, tree.children))
    if widest > vocab_size:
        raise ValueError(f"a node with {widest} children needs as many different tokens, but the vocabulary has {vocab_size}")


def require_same(draft: ModelRunner, target: ModelRunner, *, vocabulary: bool = True) -> None:
    """Raise ValueError unless the draft model fits `target`."""
    compared = [("device", draft.device, target.device), ("dtype", draft.dtype, target.dtype)]
    if vocabulary:
        compared.insert(0, ("vocabulary size", draft.vocab_size, target.vocab_size))
    for what, ours, theirs in compared:
        if ours != theirs:
            raise ValueError(f"draft and target model must have the same {what}, got {ours} for the draft and {theirs} for the target")
