"""A draft model with another tokenizer: it drafts only tokens that both vocabularies have.

Its probabilities of all other tokens are set to zero and the rest made a distribution again, so what it draws, and what
it says it drew from, is a distribution over the target's tokens: the output stays exact. Accepted text reaches it in
its own tokens, each target token's text encoded by itself. Source: Timor et al. 2025 (lossless speculative decoding for
heterogeneous vocabularies), Algorithm 4 (TLI)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import require_same, run_nodes
from specdec.drafters.vocabulary import shared_tokens
from specdec.model.runner import ModelRunner
from specdec.requests.rows import DraftContext
from specdec.trees.tree import TokenTree


class TranslatedDrafter:
    """Drafts a chain of `num_tokens` for a target with another vocabulary than `draft`'s.

    `target_tokenizer` and `draft_tokenizer` are transformers tokenizers. Two tokens are the same when their texts are.
    Where the text takes more than four draft tokens a target token, or more than the draft model has positions, the
    draft sees its last part only. Raises ValueError when the vocabularies share no token and, once it meets its target,
    for another device or dtype."""

    shapes = "chain"

    def __init__(self, draft, target_tokenizer, draft_tokenizer, num_tokens: int = 5, sample: bool = True):
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self.runner = ModelRunner(draft, mode="eager")
        self._target, self._draft = target_tokenizer, draft_tokenizer
        pairs = shared_tokens(target_tokenizer, draft_tokenizer)
        self._pairs = torch.tensor(
            [pair for pair in pairs if pair[1] < self.runner.vocab_size], dtype=torch.int64
        ).view(-1, 2)
        if not len(self._pairs):
            raise ValueError(
                f"the vocabularies of {len(target_tokenizer)} and {len(draft_tokenizer)} tokens have no token in common"
            )
        self.max_tokens, self._sample = num_tokens, sample

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the draft model runs where the target does."""
        require_same(self.runner, target, vocabulary=False)
        if not bool((self._pairs[:, 0] < target.vocab_size).any()):
            raise ValueError(f"no token that both tokenizers have is among the target's {target.vocab_size}")

    def start(self, context: DraftContext, max_tokens: int) -> ModelDraftSession:
        """Begin to draft."""
        pairs = self._pairs[
            self._pairs[:, 0] < context.target.vocab_size
        ]  # a tokenizer may know more tokens than its model
        state = _TranslatedState(self.runner, context, max_tokens, pairs, self._target, self._draft)
        known = state.known

        def only_known(scores: Tensor) -> Tensor:
            """The processors may have left none of the tokens that the draft knows: then nothing is drafted."""
            return torch.where(known, scores, float("-inf"))

        chain, sample = TokenTree.chain(self.max_tokens), self._sample and context.do_sample
        return ModelDraftSession(state, context, chain, sample, adjust=only_known, lacks=True)


class _TranslatedState:
    """Stands in for `ModelState`: target tokens go in and scores of target tokens come out; between them lies the
    draft's vocabulary.

    A row's text in the draft's tokens grows on the host, since one target token may become several.
    """

    def __init__(
        self,
        runner: ModelRunner,
        context: DraftContext,
        max_tokens: int,
        pairs: Tensor,
        target_tokenizer,
        draft_tokenizer,
    ):
        self.runner, self._context = runner, context
        self._target_tokenizer, self._draft_tokenizer = target_tokenizer, draft_tokenizer
        self._target_ids, self._draft_ids = pairs.to(runner.device).unbind(1)
        self._to_draft = torch.zeros(context.target.vocab_size, dtype=torch.int64, device=runner.device).scatter_(
            0, self._target_ids, self._draft_ids
        )
        self.known = torch.zeros(context.target.vocab_size, dtype=torch.bool, device=runner.device).index_fill_(
            0, self._target_ids, True
        )
        self._one = dict(pairs.tolist())
        self._text = [
            self._translate(context.tokens[row, :length].tolist()) for row, length in enumerate(context.lengths)
        ]  # waits, once a call
        self._known = list(context.lengths)  # target tokens that `_text` covers
        # a text that outgrows its room goes on with its second half, which the output's distribution does not depend on
        most = float("inf") if runner.max_positions is None else runner.max_positions - max_tokens
        self._room = [max(2, int(min(4 * limit, most))) for limit in context.limits]
        runner.reserve([room + max_tokens for room in self._room])
        self._sequences = {row: runner.cache.add() for row in range(len(context.lengths))}

    def _translate(self, tokens: Sequence[int]) -> list[int]:
        translated: list[int] = []
        for token in tokens:
            one = self._one.get(token)
            translated += (
                [one]
                if one is not None
                else self._draft_tokenizer(self._target_tokenizer.decode([token]), add_special_tokens=False).input_ids
            )
        return translated

    def catch_up(self, rows: Sequence[int]) -> Tensor:
        """Translate and run the accepted tokens that the cache has not seen -> scores `[A, V]` of the target's tokens
        after the last one.
        """
        context, cache, unseen = self._context, self.runner.cache, []
        for row in rows:
            behind = context.lengths[row] - self._known[row]
            if behind > len(context.new_tokens[row]):  # rounds went by without a draft
                self._text[row] += self._translate(
                    context.tokens[row, self._known[row] : context.lengths[row]].tolist()
                )
            elif behind:
                self._text[row] += self._translate(context.new_tokens[row][-behind:])
            self._known[row] = context.lengths[row]
            sequence = self._sequences[row]
            self._text[row] = self._text[row] or [0]  # a draft model needs some token to start from
            if len(self._text[row]) > self._room[row]:
                self._text[row] = self._text[row][-(self._room[row] // 2) :]
                cache.truncate(sequence, 0)
            if cache.length(sequence) >= len(self._text[row]):
                cache.truncate(sequence, len(self._text[row]) - 1)
            unseen.append(torch.tensor(self._text[row][cache.length(sequence) :], device=self.runner.device))
        return self._scores(self.runner.extend([self._sequences[row] for row in rows], unseen))

    def run(self, rows: Sequence[int], tokens: Tensor, tree: TokenTree | None = None) -> Tensor:
        """Run drafted tokens, all of which the draft model knows."""
        return self._scores(run_nodes(self.runner, [self._sequences[row] for row in rows], self._to_draft[tokens]))

    def _scores(self, logits: Tensor) -> Tensor:
        scores = logits.new_full((*logits.shape[:-1], self._context.target.vocab_size), torch.finfo(logits.dtype).min)
        return scores.index_copy_(-1, self._target_ids, logits[..., self._draft_ids])

    def rest(self, rows: Sequence[int]) -> None:
        """What a proposal ran goes in `keep`."""

    def keep(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep the text of before the round; accepted tokens come back translated with the next one."""
        for row in rows:
            cache, sequence = self.runner.cache, self._sequences[row]
            cache.truncate(sequence, min(cache.length(sequence), len(self._text[row])))

    def release(self, rows: Sequence[int]) -> None:
        """Give the rows' pages back."""
        for row in rows:
            self.runner.cache.free(self._sequences.pop(row))
