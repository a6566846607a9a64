"""What a drafter hands to the verifier."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree, its tokens, and the distribution the tokens were really drawn from.

    `tokens [B, N]` int64, column 0 the last accepted token. `probs [B, I, V]` belongs to the I internal nodes (nodes with children) in
    increasing order: row i is the distribution, after temperature, top-k, top-p and penalties, from which the children of the i-th
    internal node were drawn; a chain has I = N - 1. None means that the choice was deterministic. Raises ValueError on a wrong shape.
    """

    tree: TokenTree
    tokens: Tensor
    probs: Tensor | None = None

    def __post_init__(self):
        if self.tokens.ndim != 2 or self.tokens.shape[1] != self.tree.size or self.tokens.dtype != torch.int64:
            raise ValueError(f"a tree of {self.tree.size} nodes needs int64 tokens [B, {self.tree.size}], got {list(self.tokens.shape)} of {self.tokens.dtype}")
        internal = len(set(self.tree.parents[1:]))
        if self.probs is not None and (self.probs.ndim != 3 or self.probs.shape[:2] != (self.tokens.shape[0], internal)):
            raise ValueError(f"probs must be [{self.tokens.shape[0]}, {internal}, V], got {list(self.probs.shape)}")
