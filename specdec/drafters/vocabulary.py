"""Two vocabularies and the tokens that both have."""

from collections.abc import Sequence

import torch
from torch import Tensor


class VocabularyMap:
    """Between a target's tokens and a draft model's: texts, drafted tokens and scores.

    `pairs [n, 2]` int64: (target id, draft id) of each token that both have. `known [V]` bool: the target's among
    them.
    """

    def __init__(self, pairs: Tensor, vocab_size: int, target_tokenizer, draft_tokenizer, device: torch.device):
        self._target, self._draft, self._one = target_tokenizer, draft_tokenizer, dict(pairs.tolist())
        self._target_ids, self._draft_ids = pairs.to(device).unbind(1)
        self.vocab_size = vocab_size
        zeros = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        self._to_draft = zeros.scatter(0, self._target_ids, self._draft_ids)
        self.known = zeros.bool().index_fill_(0, self._target_ids, True)

    def translate(self, tokens: Sequence[int]) -> list[int]:
        """The draft's tokens for a text in the target's: a token that both have, or the encoding of its text."""
        translated: list[int] = []
        for token in tokens:
            one = self._one.get(token)
            text = None if one is not None else self._target.decode([token])
            translated += [one] if text is None else self._draft(text, add_special_tokens=False).input_ids
        return translated

    def to_draft(self, tokens: Tensor) -> Tensor:
        """The draft's ids of target tokens, all of which both have."""
        return self._to_draft[tokens]

    def scores(self, logits: Tensor) -> Tensor:
        """`logits [..., draft's V]` as scores `[..., target's V]`: tokens that the draft lacks get the least finite
        number."""
        scores = logits.new_full((*logits.shape[:-1], self.vocab_size), torch.finfo(logits.dtype).min)
        return scores.index_copy_(-1, self._target_ids, logits[..., self._draft_ids])


def shared_tokens(target_tokenizer, draft_tokenizer) -> list[tuple[int, int]]:
    """(target id, draft id) of the tokens whose text is the same, a leading space included; special tokens pair by name
    only.
    """
    special = set(target_tokenizer.all_special_tokens) | set(draft_tokenizer.all_special_tokens)

    def texts(tokenizer) -> dict[str, int]:
        spaces = {
            tokenizer.convert_ids_to_tokens(ids)[0][0]
            for ids in [tokenizer(" ", add_special_tokens=False).input_ids]
            if ids
        }
        found: dict[str, int] = {}
        for token, index in tokenizer.get_vocab().items():
            text = token if token in special else "".join(" " if c in spaces else c for c in token)
            found[text] = min(index, found.get(text, index))
        return found

    ours, theirs = texts(target_tokenizer), texts(draft_tokenizer)
    return sorted((index, theirs[text]) for text, index in ours.items() if text in theirs)
