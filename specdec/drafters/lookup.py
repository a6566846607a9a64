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
        ends, found = find_matches(text, lengths, self.candidates, self.max_ngram, self.min_ngram)
        step = torch.arange(1, self.length + 1, device=text.device)
        index = ends[..., None] + step  # [A, C, length]
        exists = found[..., None] & (index < lengths[..., None])
        guess = text.gather(1, index.clamp(max=text.shape[1] - 1).flatten(1)).view(index.shape)
        paths = guess[:, :, None].expand(-1, -1, self.length, -1).flatten(1, 2)
        depths = step.repeat(self.candidates).expand(batch.size, -1)
        root = text.gather(1, lengths - 1)
        return merge_paths(root, paths, depths, exists.flatten(1), self.traits.max_tokens, self.candidates)


def find_matches(text: Tensor, lengths: Tensor, candidates: int, max_ngram: int,
                 min_ngram: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Earlier occurrences of the last tokens of `text [A, L]`, of which `lengths [A, 1]` are valid.

    Returns the last index of each match `[A, C]` and whether there is one.

    >>> text, lengths = torch.tensor([[1, 2, 9, 1, 2, 7, 1, 2]]), torch.tensor([[8]])
    >>> find_matches(text, lengths, candidates=3, max_ngram=2, min_ngram=2)
    (tensor([[4, 1, 7]]), tensor([[ True,  True, False]]))
    """
    count, size = text.shape
    place = torch.arange(size, device=text.device)
    matched, running = torch.zeros_like(text), torch.ones_like(text, dtype=torch.bool)
    for back in range(max_ngram):  # compare the token `back` before each place with the one `back` before the end
        wanted = text.gather(1, (lengths - 1 - back).clamp(min=0))
        shifted = torch.nn.functional.pad(text, (back, 0), value=-1)[:, :size]
        running = running & (shifted == wanted) & (lengths > back)
        matched = matched + running
    earlier = (place < lengths - 1) & (matched >= min_ngram)
    rank = torch.where(earlier, matched * size + place, -1 - (lengths - 1 - place).abs())  # longest match, then latest
    best = rank.topk(min(candidates, size), 1)
    found = best.values >= 0
    ends = best.indices
    if size < candidates:
        ends, found = (torch.nn.functional.pad(x, (0, candidates - size)) for x in (ends, found))
    return ends, found
