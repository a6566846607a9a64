"""What a drafter hands to the verifier."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.cuda_graph import keep_alive
from specdec.trees.tensors import TreeBatch, TreeTensors, tree_tensors
from specdec.trees.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree, its tokens, and the distribution the tokens were really drawn from.

    `tree` is one topology for all rows, or a `TreeBatch` with one a row. `tokens [B, N]` int64, column 0 the last
    accepted token. `probs [B, I, V]` belongs to the I internal nodes (nodes with children) of a `TokenTree` in
    increasing order: row i is the distribution, after temperature, top-k, top-p and penalties, from which the children
    of the i-th internal node were drawn, one after the other: independently, or with `distinct` without replacement.
    None means that the choice was deterministic, given the tokens before.

    `valid [B, N]` bool says which nodes of a `TokenTree` a row has (None: all); what hangs below an absent node is
    absent too. Raises ValueError on a wrong shape, and for `probs` together with a `TreeBatch`."""

    tree: TokenTree | TreeBatch
    tokens: Tensor
    probs: Tensor | None = None
    distinct: bool = False
    valid: Tensor | None = None

    def __post_init__(self):
        size = self.tree.size
        if self.tokens.ndim != 2 or self.tokens.shape[1] != size or self.tokens.dtype != torch.int64:
            raise ValueError(
                f"a tree of {size} nodes needs int64 tokens [B, {size}], got {list(self.tokens.shape)} of "
                f"{self.tokens.dtype}"
            )
        if isinstance(self.tree, TreeBatch):
            if self.probs is not None or self.valid is not None or self.tree.parents.shape[0] != self.tokens.shape[0]:
                raise ValueError(
                    f"a TreeBatch of {self.tree.parents.shape[0]} rows says itself which nodes exist and "
                    "takes deterministic tokens only"
                )
            return
        internal = len(self.tree.internal)
        if self.probs is not None and (
            self.probs.ndim != 3 or self.probs.shape[:2] != (self.tokens.shape[0], internal)
        ):
            raise ValueError(f"probs must be [{self.tokens.shape[0]}, {internal}, V], got {list(self.probs.shape)}")
        if self.valid is not None and (self.valid.shape != self.tokens.shape or self.valid.dtype != torch.bool):
            raise ValueError(
                f"valid must be bool {list(self.tokens.shape)}, got {self.valid.dtype} {list(self.valid.shape)}"
            )

    @property
    def tables(self) -> TreeTensors:
        """The tree's index tables on the tokens' device, `valid` included."""
        if isinstance(self.tree, TreeBatch):
            return self.tree.tables
        tables = keep_alive(tree_tensors(self.tree, self.tokens.device))
        return tables if self.valid is None else replace(tables, valid=self.valid)

    @property
    def max_depth(self) -> int:
        """Drafted tokens on the longest path that any row may have."""
        return self.tree.max_depth
