"""The tokens that two vocabularies have in common, and the map between them.

Models of one family pad their tables of one tokenizer to different multiples (Qwen2 has 151936 or 152064 rows):
`resized` is all the map that they need."""

from collections.abc import Sequence

import torch
from torch import Tensor

PADDING_ROWS, PADDING_SHARE = 1024, 0.01  # tables of one tokenizer differ by the larger of these at most


def require_one_vocabulary(draft: int, target: int) -> None:
    """Raise ValueError for two numbers of tokens that cannot be one tokenizer's with and without padding.

    Nothing in two models tells whether their tokenizers agree. Tables are padded to multiples of up to 1024 rows (often
    64 or 128 for each GPU), so sizes that differ by at most 1024 or 1% pass, unless one is more than twice the other.
    With another tokenizer of about that size drafts are seldom right; the text stays the target's."""
    smaller, larger = sorted((draft, target))
    if larger - smaller > max(PADDING_ROWS, PADDING_SHARE * larger) or larger > 2 * smaller:
        raise ValueError(
            f"draft and target model must have the same vocabulary, apart from padding, got {draft} tokens for the "
            f"draft and {target} for the target: TranslatedDrafter drafts with another tokenizer"
        )


def resized(logits: Tensor, vocab_size: int) -> Tensor:
    """A draft model's `logits [..., V']` for the first `vocab_size` tokens, -inf for those that it lacks.

    >>> logits = torch.tensor([1.0, 2.0])
    >>> resized(logits, 3), resized(logits, 1)
    (tensor([1., 2., -inf]), tensor([1.]))
    """
    missing = vocab_size - logits.shape[-1]
    return logits[..., :vocab_size] if missing <= 0 else torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


class VocabularyMap:
    """Translates texts, drafted tokens and scores between a target's vocabulary and a draft model's.

    pairs [n, 2] int64: (target id, draft id) of each common token.
    known [V] bool: which of the target's tokens are common.
    """

    def __init__(self, pairs: Tensor, vocab_size: int, target_tokenizer, draft_tokenizer, device: torch.device):
        self._target, self._draft, self._one = target_tokenizer, draft_tokenizer, dict(pairs.tolist())
        self._target_ids, self._draft_ids = pairs.to(device).unbind(1)
        self.vocab_size = vocab_size
        zeros = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        self._to_draft = zeros.scatter(0, self._target_ids, self._draft_ids)
        self.known = zeros.bool().index_fill_(0, self._target_ids, True)

    def translate(self, tokens: Sequence[int]) -> list[int]:
        """Translate target tokens to draft tokens: common ones by id, others by encoding their text."""
        translated: list[int] = []
        for token in tokens:
            if token in self._one:
                translated.append(self._one[token])
            else:
                translated += self._draft(self._target.decode([token]), add_special_tokens=False).input_ids
        return translated

    def to_draft(self, tokens: Tensor) -> Tensor:
        """The draft's ids of common target tokens."""
        return self._to_draft[tokens]

    def scores(self, logits: Tensor) -> Tensor:
        """Turn `logits [..., draft's V]` into scores `[..., target's V]`, the lowest ones for other tokens."""
        scores = logits.new_full((*logits.shape[:-1], self.vocab_size), torch.finfo(logits.dtype).min)
        return scores.index_copy_(-1, self._target_ids, logits[..., self._draft_ids])


def shared_tokens(target_tokenizer, draft_tokenizer) -> list[tuple[int, int]]:
    """(target id, draft id) of tokens with equal text, leading spaces included; special tokens pair by name only."""
    special = set(target_tokenizer.all_special_tokens) | set(draft_tokenizer.all_special_tokens)

    def texts(tokenizer) -> dict[str, int]:
        ids = tokenizer(" ", add_special_tokens=False).input_ids
        spaces = {tokenizer.convert_ids_to_tokens(ids)[0][0]} if ids else set()
        found: dict[str, int] = {}
        for token, index in tokenizer.get_vocab().items():
            text = token if token in special else "".join(" " if c in spaces else c for c in token)
            found[text] = min(index, found.get(text, index))
        return found

    ours, theirs = texts(target_tokenizer), texts(draft_tokenizer)
    return sorted((index, theirs[text]) for text, index in ours.items() if text in theirs)
