"""A draft model with another tokenizer, which drafts only tokens that both vocabularies have.

Its distribution is restricted to these tokens and normalised, so tokens are drawn from the reported distribution over
the target's vocabulary and the output stays exact. Accepted tokens are translated one by one: each target token's text
is encoded by the draft's tokenizer. Source: Timor et al. 2025 (lossless speculative decoding for
heterogeneous vocabularies), Algorithm 4 (TLI)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.drafters.base import DrafterTraits
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import run_nodes
from specdec.drafters.vocabulary import VocabularyMap, shared_tokens
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree
from specdec.trees.tree import TokenTree


class TranslatedDrafter:
    """Drafts a chain of `num_tokens` for a target with another vocabulary than `draft`'s.

    `target_tokenizer` and `draft_tokenizer` are transformers tokenizers; tokens with equal texts are the same. A text
    of more than four draft tokens per target token, or longer than the draft model's positions, is cut to its last
    part. The draft model may have another dtype, and run on another device. Raises ValueError for vocabularies without
    a common token and, in `validate`, for a target that has none of the common ones."""

    def __init__(self, draft, target_tokenizer, draft_tokenizer, num_tokens: int = 5, sample: bool = True):
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self.runner = ModelRunner(draft, mode="eager")
        self._target, self._draft = target_tokenizer, draft_tokenizer
        pairs = shared_tokens(target_tokenizer, draft_tokenizer)
        pairs = [pair for pair in pairs if pair[1] < self.runner.vocab_size]
        self._pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        if not len(self._pairs):
            raise ValueError(
                f"the vocabularies of {len(target_tokenizer)} and {len(draft_tokenizer)} tokens have no token in common"
            )
        self.traits, self._sample = DrafterTraits(num_tokens, "chain"), sample

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the target has a token that both tokenizers have."""
        if not bool((self._pairs[:, 0] < target.vocab_size).any()):
            raise ValueError(f"no token that both tokenizers have is among the target's {target.vocab_size}")

    def start(self, rows: Rows, max_tokens: int) -> ModelDraftSession:
        """Begin to draft."""
        size = rows.target.vocab_size
        pairs = self._pairs[self._pairs[:, 0] < size]  # a tokenizer may know more tokens than its model
        vocabulary = VocabularyMap(pairs, size, self._target, self._draft, rows.target.device)
        state = _TranslatedState(self.runner, rows, max_tokens, vocabulary)

        def only_known(scores: Tensor) -> Tensor:
            """Forbid tokens that the draft lacks; where the processors forbid all others, nothing is drafted."""
            return torch.where(vocabulary.known, scores, float("-inf"))

        chain, sample = TokenTree.chain(self.traits.max_tokens), self._sample and rows.do_sample
        return ModelDraftSession(state, chain, sample, adjust=only_known, lacks=True)


class _TranslatedState:
    """A `DraftState` that takes target tokens and returns scores of target tokens.

    Each row's text in the draft's tokens is kept on the host, since one target token may become several.
    """

    reader = None

    def __init__(self, runner: ModelRunner, rows: Rows, max_tokens: int, vocabulary: VocabularyMap):
        self.runner, self.draft_room, self._vocabulary = runner, max_tokens, vocabulary
        self._text: dict[Row, list[int]] = {}
        self._translated: dict[Row, int] = {}  # target tokens that `_text` covers
        self._room: dict[Row, int] = {}
        self._sequences: dict[Row, int] = {}
        self.admit(rows, rows.members)

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """See `DraftSession.admit`. Waits for the device."""
        runner = self.runner
        # a text longer than its room is cut to half of it, which does not change the output's distribution
        most = float("inf") if runner.max_positions is None else runner.max_positions - self.draft_room
        for row in joining:
            self._text[row] = self._vocabulary.translate(rows.tokens[row.slot, : row.length].tolist())
            self._translated[row], self._room[row] = row.length, max(2, int(min(4 * row.limit, most)))
        runner.reserve([self._room[row] + self.draft_room for row in joining])
        self._sequences |= {row: runner.cache.add() for row in joining}

    def catch_up(self, batch: Batch) -> Tensor:
        """Translate and run the accepted tokens that the cache lacks -> scores `[A, V]` of the target's tokens."""
        texts = [self._grown(batch, row) for row in batch.members]
        sequences, cache = self._of(batch.members), self.runner.cache
        pairs = zip(texts, sequences, strict=True)
        unseen = [torch.tensor(text[cache.length(s) :], device=self.runner.device) for text, s in pairs]
        return self._vocabulary.scores(self.runner.extend(sequences, unseen).to(batch.device))

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Run the last token too: no round of this drafter is captured."""
        self.catch_up(Batch(rows, members))

    def _grown(self, batch: Batch, row: Row) -> list[int]:
        """Translate the row's new tokens and return its text, of which at least the last token is still to run."""
        cache, sequence = self.runner.cache, self._sequences[row]
        missing = row.length - self._translated[row]
        if missing > len(row.new_tokens):  # some rounds had no draft
            new = batch.rows.tokens[row.slot, row.length - missing : row.length].tolist()
        else:
            new = row.new_tokens[len(row.new_tokens) - missing :]
        text = self._text[row] + self._vocabulary.translate(new) or [0]  # a forward needs at least one token
        if len(text) > self._room[row]:
            text = text[-(self._room[row] // 2) :]
            cache.truncate(sequence, 0)
        if cache.length(sequence) >= len(text):
            cache.truncate(sequence, len(text) - 1)
        self._text[row], self._translated[row] = text, row.length
        return text

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """See `DraftState.run`; the draft's vocabulary has all drafted tokens."""
        tokens = self._vocabulary.to_draft(tokens)
        return self._vocabulary.scores(run_nodes(self, batch, self._of(batch.members), tokens))

    def end_proposal(self, batch: Batch) -> None:
        """Do nothing: drafted nodes stay until `truncate`."""

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Keep the text before the round; accepted tokens are translated and run in the next one."""
        cache = self.runner.cache
        for row, sequence in zip(rows, self._of(rows), strict=True):
            cache.truncate(sequence, min(cache.length(sequence), len(self._text[row])))

    def pages_wanted(self, row: Row) -> int:
        """See `DraftState.pages_wanted`: all that its translated text may ever fill."""
        cache, sequence = self.runner.cache, self._sequences[row]
        return cache.pages_for(self._room[row] + self.draft_room) - len(cache.pages(sequence))

    def prefix_sequence(self, row: Row) -> int | None:
        """None: it holds a translation."""
        return None

    def with_pages(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
        """Raise RuntimeError: the host translates in every round."""
        raise RuntimeError("a draft in another vocabulary cannot run in captured rounds")

    def release(self, rows: Sequence[Row]) -> None:
        """See `DraftState.release`."""
        for row in rows:
            self.runner.cache.free(self._sequences.pop(row))

    def _of(self, rows: Sequence[Row]) -> list[int]:
        return [self._sequences[row] for row in rows]
