"""Prompt lookup: where text repeats, what followed the last few tokens earlier is a good guess.

Source: Saxena 2023 (prompt lookup decoding); Yang et al. 2023 (LLMA)."""

import torch
from torch import Tensor

from specdec.drafters.base import DrafterTraits, StatelessSession
from specdec.drafters.paths import merge_paths
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Rows
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


class PromptLookupDrafter:
    """Proposes what followed earlier occurrences of the last `min_ngram` to `max_ngram` tokens.

    The `candidates` occurrences with the longest match, of equal ones the latest, give `length` tokens each, merged
    into a tree of up to `num_tokens` nodes (None: room for all). The search covers the prompt and the text so far and
    runs on the device, without a model; rows without a match propose nothing. Raises ValueError for numbers that do not
    fit together."""

    def __init__(self, length: int = 8, candidates: int = 3, max_ngram: int = 3, min_ngram: int = 1,
                 num_tokens: int | None = None):  # fmt: skip
        counts = length, candidates, min_ngram, 1 if num_tokens is None else num_tokens
        if min(counts) < 1 or max_ngram < min_ngram:
            raise ValueError(
                f"length {length}, candidates {candidates}, min_ngram {min_ngram} <= max_ngram {max_ngram}, "
                f"num_tokens {num_tokens}: all must be >= 1"
            )
        self.length, self.candidates, self.max_ngram, self.min_ngram = length, candidates, max_ngram, min_ngram
        tokens = length * candidates if num_tokens is None else num_tokens
        self.traits = DrafterTraits(tokens, captured=True, own_depth=length)

    def validate(self, target: ModelRunner) -> None:
        """Do nothing: it can draft for every target."""

    def start(self, rows: Rows, max_tokens: int) -> StatelessSession:
        """A session that searches the text in every round."""
        return StatelessSession(self.propose)

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """Find earlier occurrences, then merge what followed them."""
        text, lengths = batch.text()
        ends, matched = find_matches(text, lengths, self.candidates, self.max_ngram, self.min_ngram)
        guess, exists = what_followed(text, lengths, ends, matched, self.length)
        step = torch.arange(1, self.length + 1, device=text.device)
        paths = guess[:, :, None].expand(-1, -1, self.length, -1).flatten(1, 2)
        depths = step.repeat(self.candidates).expand(batch.size, -1)
        root = text.gather(1, lengths - 1)
        return merge_paths(root, paths, depths, exists.flatten(1), self.traits.max_tokens, self.candidates)


def find_matches(text: Tensor, lengths: Tensor, candidates: int, max_ngram: int,
                 min_ngram: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Earlier occurrences of the last tokens of `text [A, L]`, of which `lengths [A, 1]` are valid.

    Returns the last index of each match `[A, C]`, the longest match first, of equal ones the latest, and how many
    tokens match there, at most `max_ngram` (0: fewer than `min_ngram`, no match).

    >>> text, lengths = torch.tensor([[1, 2, 9, 1, 2, 7, 1, 2]]), torch.tensor([[8]])
    >>> find_matches(text, lengths, candidates=3, max_ngram=2, min_ngram=2)
    (tensor([[4, 1, 7]]), tensor([[2, 2, 0]]))
    """
    size = text.shape[1]
    place = torch.arange(size, device=text.device)
    # [A, L, n]: of each place the tokens up to it, compared with the last ones of the text
    upto = torch.nn.functional.pad(text, (max_ngram - 1, 0), value=-1).unfold(1, max_ngram, 1)
    matched = places_before((upto != last_tokens(text, lengths, max_ngram).flip(1)[:, None]).flip(2))
    earlier = (place < lengths - 1) & (matched >= min_ngram)
    rank = torch.where(earlier, matched * size + place, -1 - (lengths - 1 - place).abs())  # longest match, then latest
    best = rank.topk(min(candidates, size), 1)
    ends, matched = best.indices, best.values.clamp(min=0) // size
    if size < candidates:
        ends, matched = (torch.nn.functional.pad(x, (0, candidates - size)) for x in (ends, matched))
    return ends, matched


def last_tokens(text: Tensor, lengths: Tensor, count: int) -> Tensor:
    """`[A, count]`: the last of the `lengths [A, 1]` tokens of each `text [A, L]`, the last first, -2 for those that a
    text does not have."""
    place = lengths - 1 - torch.arange(count, device=text.device)
    return torch.where(place >= 0, text.gather(1, place.clamp(min=0)), -2)


def shared_tokens(tokens: Tensor, others: Tensor) -> Tensor:
    """`[...]`: how many of the first tokens of `tokens [..., n]` and `others [..., n]` are equal."""
    return places_before(tokens != others)


def places_before(differs: Tensor) -> Tensor:
    """`[...]`: how many places of `differs [..., n]` come before the first that is true."""
    return torch.nn.functional.pad(differs.to(torch.uint8), (0, 1), value=1).argmax(-1)  # the first of equal ones


def what_followed(text: Tensor, lengths: Tensor, ends: Tensor, matched: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The up to `count` tokens after each match of `find_matches` `[A, C, count]`, and which of them there are."""
    index = ends[..., None] + torch.arange(1, count + 1, device=text.device)
    exists = (matched > 0)[..., None] & (index < lengths[..., None])
    return text.gather(1, index.clamp(max=text.shape[1] - 1).flatten(1)).view(index.shape), exists
