"""Suffix decoding: what followed the longest match of the text's end, here and in past answers, weighed by counts.

Source: Oliaro et al. 2024 (SuffixDecoding, arXiv 2411.04975)."""

import torch
from torch import Tensor

from specdec.drafters.base import DrafterTraits, StatelessSession
from specdec.drafters.lookup import find_matches, last_tokens, what_followed
from specdec.drafters.paths import merge_paths
from specdec.drafters.suffix_memory import SuffixMemory
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Rows
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


class SuffixDrafter:
    """Proposes what followed the longest match of the last tokens, in the row's own text and in `memory`.

    A match of m tokens, at most `max_match`, gives at most `factor` x m tokens, and no more than `num_tokens`. Of the
    places that match longest the `occurrences` latest of the text and of the memory are counted; a continuation's
    probability is the share of them that it follows, and ends where that falls below `min_probability`. The draft is a
    chain, at each depth the most frequent token, or with `tree` the `num_tokens` likeliest nodes. Everything is
    computed on the device, without a model; rows without a match propose nothing.

    `memory` (None: the text alone) outlives calls and is fed with each row that ends; see `SuffixMemory`. Raises
    ValueError for numbers out of range.

    >>> drafter = SuffixDrafter(memory=SuffixMemory(max_answers=100))
    >>> drafter.memory.stats.answers
    0
    """

    def __init__(self, num_tokens: int = 16, max_match: int = 24, factor: float = 2.0, min_probability: float = 0.1,
                 tree: bool = False, occurrences: int = 16, memory: SuffixMemory | None = None):  # fmt: skip
        if min(num_tokens, max_match, occurrences) < 1:
            raise ValueError(
                f"num_tokens, max_match and occurrences must be at least 1, got {num_tokens}, {max_match} and "
                f"{occurrences}"
            )
        if not (factor > 0 and 0 <= min_probability <= 1):
            raise ValueError(
                f"factor must be above 0 and min_probability in [0, 1], got {factor} and {min_probability}"
            )
        if memory is not None and not isinstance(memory, SuffixMemory):
            raise ValueError(f"memory must be a SuffixMemory or None, got {memory!r}")
        self.max_match, self.factor, self.min_probability = max_match, factor, min_probability
        self.tree, self.occurrences, self.memory = tree, occurrences, memory
        self.depth = min(num_tokens, max(1, int(factor * max_match)))
        self.traits = DrafterTraits(num_tokens if tree else self.depth, captured=True, own_depth=self.depth)

    def validate(self, target: ModelRunner) -> None:
        """Do nothing: it can draft for every target."""

    def start(self, rows: Rows, max_tokens: int) -> StatelessSession:
        """A session that searches the text, and the memory as it then is, in every round."""
        if self.memory is None:
            return StatelessSession(self.propose)
        table = self.memory.table(rows.tokens.device)
        return StatelessSession(self.propose, (table.tokens.data_ptr(), table.order.data_ptr()))

    def propose(self, batch: Batch, tree: TokenTree | None = None) -> Draft:
        """Find the longest matches, count what followed them, and keep what is likely."""
        text, lengths = batch.text()
        places, matched = find_matches(text, lengths, self.occurrences, self.max_match, 1)
        guess, exists = what_followed(text, lengths, places, matched, self.depth)
        if self.memory is not None:
            table = self.memory.table(text.device)
            ending = last_tokens(text, lengths, min(self.max_match, self.memory.max_match))
            places, shared = table.search(ending, self.occurrences)
            tokens, there = table.following(places, shared, self.depth)
            known = (tokens < batch.rows.target.vocab_size).cumprod(-1).bool()  # of the target that drafts now
            guess, exists = torch.cat([guess, tokens], 1), torch.cat([exists, there & known], 1)
            matched = torch.cat([matched, shared], 1)
        longest = matched.amax(1)[:, None]  # [A, 1]
        depths = torch.arange(1, self.depth + 1, device=text.device)
        deepest = (longest * self.factor).long().clamp(min=1)
        exists = exists & (matched == longest)[..., None] & (depths <= deepest)[:, None]
        nodes, size = likely_nodes(guess, exists, self.min_probability, self.tree), self.traits.max_tokens
        chosen = nodes.flatten(1).topk(min(size, nodes[0].numel()), 1)  # parents before children
        occurrence, depth = chosen.indices // self.depth, chosen.indices % self.depth
        paths = guess.gather(1, occurrence[..., None].expand(-1, -1, self.depth))
        root = text.gather(1, lengths - 1)
        return merge_paths(root, paths, depth + 1, chosen.values > 0, size, guess.shape[1] if self.tree else 1)


def likely_nodes(guess: Tensor, exists: Tensor, least: float, tree: bool) -> Tensor:
    """The nodes of the tree of C continuations, each at its first continuation: `[A, C, L]`, 0 where there is none.

    Nodes that more continuations pass have larger numbers, a node a larger one than its children. The share of
    continuations that pass a node is at least `least`; without `tree` a node has one child, the most frequent.

    guess [A, C, L] int64: the tokens of each continuation
    exists [A, C, L] bool: which there are; none after the first that is absent
    """
    count, length = guess.shape[1:]
    order = torch.arange(count, device=guess.device)
    together = (guess[:, :, None] == guess[:, None]) & exists[:, :, None] & exists[:, None]  # [A, C, C, L]
    same = together.to(torch.uint8).cumprod(-1, dtype=torch.uint8)  # whether two paths share a node
    passed, first = same.sum(2), same.argmax(2)  # [A, C, L]
    total = exists[..., 0].sum(1)[:, None, None]
    likely = exists & (passed >= least * total)
    if not tree:
        rank = (passed * count + count - 1 - first) * likely  # different for different nodes
        siblings = torch.nn.functional.pad(same[..., :-1], (1, 0), value=1)  # whether two paths share the node above
        best = (rank[:, None] * siblings).amax(2)
        likely = likely & (rank == best).cumprod(-1).bool()
    number = (passed * (length + 1) + length - torch.arange(length, device=guess.device)) * count
    return torch.where(likely & (first == order[:, None]), number + count - 1 - order[:, None], 0)
