"""A smaller model drafts a chain, one token after the other (Leviathan et al. 2023; Chen et al. 2023)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.draft import Draft
from specdec.drafters.base import DraftContext
from specdec.noise import Stream
from specdec.runner import ModelRunner
from specdec.sampling import draw
from specdec.tree import TokenTree


class ModelDrafter:
    """Drafts `num_tokens` tokens a round with `draft`, a causal language model with the target's vocabulary.

    With sampling it draws from its own distribution after the same processors as the target's; greedily it takes the most likely token.
    `kv_dtype` "int8" or "fp8" quantises the draft model's own cache: what it proposes then follows the distribution that it reports, so the
    output stays exact. Raises ValueError for num_tokens < 1 and, once it meets its target, for another vocabulary, device or dtype.
    """

    def __init__(self, draft, num_tokens: int = 5, kv_dtype: str | None = None):
        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise ValueError(f"num_tokens (the draft length γ) must be an integer of at least 1, got {num_tokens!r}")
        self.runner = ModelRunner(draft, kv_dtype=kv_dtype)
        self.max_tokens = num_tokens

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the draft model fits `target`."""
        draft = self.runner
        for what, ours, theirs in (("vocabulary size", draft.vocab_size, target.vocab_size), ("device", draft.device, target.device),
                                   ("dtype", draft.dtype, target.dtype)):  # fmt: skip
            if ours != theirs:
                raise ValueError(f"draft and target model must have the same {what}, got {ours} for the draft and {theirs} for the target")

    def start(self, context: DraftContext) -> "ModelDraftSession":
        """Begin to draft; the draft model's cache gets room for every row."""
        limit = self.runner.max_positions
        if limit is not None and max(context.limits) > limit:
            raise ValueError(f"the draft model has {limit} positions, but prompt + max_new_tokens reach {max(context.limits)}")
        return ModelDraftSession(self.runner, self.max_tokens, context)


class ModelDraftSession:
    """One call's sequences in the draft model's cache. A sequence holds a prefix of its row's accepted tokens between rounds."""

    def __init__(self, runner: ModelRunner, num_tokens: int, context: DraftContext):
        self._runner, self._num_tokens, self._context = runner, num_tokens, context
        runner.reserve([limit + num_tokens for limit in context.limits])
        self._sequences = {row: runner.cache.add() for row in range(len(context.lengths))}

    def propose(self, rows: Sequence[int]) -> Draft:
        """A chain for each row. The first step also runs the accepted tokens that the cache has not seen: the prompt, the bonus token."""
        context, cache, length = self._context, self._runner.cache, self._num_tokens
        tokens, probs = [context.last_tokens(rows)], []
        sequences = [self._sequences[row] for row in rows]
        uniform = context.noise(rows).uniform(Stream.DRAFT, length) if context.do_sample else None
        for step in range(length):
            if step == 0:
                logits = self._runner.extend(sequences, [context.tokens[r, cache.length(s) : context.lengths[r]] for r, s in zip(rows, sequences, strict=True)])
            else:
                logits = self._runner.forward(sequences, tokens[-1][:, 0], [1] * len(rows)).logits
            token, q = self._choose(logits, rows, tokens, None if uniform is None else uniform[:, step])
            tokens.append(token)
            probs.append(q)
        return Draft(TokenTree.chain(length), torch.cat(tokens, 1), torch.stack(probs, 1) if context.do_sample else None)

    def _choose(self, logits: Tensor, rows: Sequence[int], tokens: list[Tensor], uniform: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The next drafted token `[A, 1]` and the distribution `[A, V]` it was drawn from with `uniform [A]` (None: greedy)."""
        context = self._context
        context.complain(~logits.amax(-1).isfinite(), "the draft model produced NaN or infinite logits")

        def prefix(m):
            row = rows[m]
            return torch.cat([context.tokens[row, : context.lengths[row]], *(t[m] for t in tokens[1:])])[None]

        scores = context.processors(logits, rows, prefix)
        context.complain(~scores.amax(-1).isfinite(), "the logits processors (or the temperature) left the draft model no finite score")
        if uniform is None:
            return scores.argmax(-1, keepdim=True), None
        q = scores.softmax(-1)
        return draw(q, uniform)[:, None], q

    def commit(self, rows: Sequence[int], accepted: Sequence[int]) -> None:
        """Drop what the target rejected. The last drafted token never entered the cache, so full acceptance leaves it one behind."""
        cache = self._runner.cache
        for row in rows:
            sequence = self._sequences[row]
            # lengths[row] already counts the accepted tokens and the target's own
            cache.truncate(sequence, min(cache.length(sequence), self._context.lengths[row] - 1))

    def release(self, rows: Sequence[int]) -> None:
        """Give the rows' pages back."""
        for row in rows:
            self._runner.cache.free(self._sequences.pop(row))
