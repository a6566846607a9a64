"""A draft: what a drafter proposes and the verifier checks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.cuda_graph import keep_alive
from specdec.trees.tensors import TreeBatch, TreeTensors, tree_tensors
from specdec.trees.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree, its tokens, and the distribution the tokens were really drawn from.

    tree: one topology for all rows, or a `TreeBatch` with one per row.
    tokens [B, N] int64: column 0 is the last accepted token.
    probs [B, I, V]: for the I internal nodes (nodes with children) in increasing order, the distribution, after
        temperature, top-k, top-p and penalties, that their children were drawn from; None if the tokens before
        determine the choice. Of a `TreeBatch` I is the most that a row may have; any distribution fills up the others.
    distinct: whether children were drawn without replacement rather than independently.
    valid [B, N] bool: which nodes of a `TokenTree` a row has (None: all); nodes below an absent one are absent too.
    totals [B, I] float64: the sums of `probs`, if they are known.

    Raises ValueError on a wrong shape, and for `valid` together with a `TreeBatch`."""

    tree: TokenTree | TreeBatch
    tokens: Tensor
    probs: Tensor | None = None
    distinct: bool = False
    valid: Tensor | None = None
    totals: Tensor | None = None

    def __post_init__(self):
        size, shape, dtype = self.tree.size, self.tokens.shape, self.tokens.dtype
        if len(shape) != 2 or shape[1] != size or dtype != torch.int64:
            raise ValueError(f"a tree of {size} nodes needs int64 tokens [B, {size}], got {list(shape)} of {dtype}")
        if self.tree.static is None:
            rows = self.tree.parents.shape[0]
            if self.valid is not None or rows != shape[0]:
                raise ValueError(
                    f"a TreeBatch of {rows} rows needs tokens of as many rows, and no valid (its parents say which "
                    "nodes exist)"
                )
        if (q := self.probs) is not None:
            internal = q.shape[1:2].numel() if self.tree.static is None else len(self.tree.static.internal)
            if q.ndim != 3 or q.shape[:2] != (shape[0], internal):
                raise ValueError(f"probs must be [{shape[0]}, {internal}, V], got {list(q.shape)}")
        if self.valid is not None and (self.valid.shape != shape or self.valid.dtype != torch.bool):
            raise ValueError(f"valid must be bool {list(shape)}, got {self.valid.dtype} {list(self.valid.shape)}")

    @property
    def tables(self) -> TreeTensors:
        """The tree's index tables on the tokens' device, `valid` included."""
        tree, device = self.tree, self.tokens.device
        tables = tree.tables if tree.static is None else keep_alive(tree_tensors(tree, device))
        return tables if self.valid is None else replace(tables, valid=self.valid)

    @property
    def max_depth(self) -> int:
        """Drafted tokens on the longest path of any row."""
        return self.tree.max_depth
