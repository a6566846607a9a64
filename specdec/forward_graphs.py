"""Forwards of a model as CUDA graphs, for rounds that the host takes part in: one recording for each number of sequences, tokens and tree.

The host writes block tables, lengths and tokens into tensors that stay, and one launch does the rest. Rounds that need no host are recorded
whole instead (`specdec.device_rounds`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.device_sequences import DeviceSequences
from specdec.graphs import Recorded, Shelf
from specdec.tree import TokenTree

MAX_TOKENS = 1024  # of one forward: beyond, launches no longer count
MIN_CAPACITY = 1024  # tokens of a sequence that a recording has room for, then the next powers of two


class ForwardGraphs:
    """The recordings of one `ModelRunner`, made when they are first asked for."""

    KEPT = 256

    def __init__(self, runner):
        self._runner, self.shelf = runner, Shelf(self.KEPT)

    @staticmethod
    def fit(counts: Sequence[int]) -> bool:
        """Whether a forward over so many new tokens of each sequence is one to record."""
        return len(set(counts)) == 1 and sum(counts) <= MAX_TOKENS

    def run(self, sequences: Sequence[int], tokens: Tensor, count: int, tree: TokenTree | tuple[Tensor, Tensor] | None, hidden: bool):
        """`ModelRunner.forward` over sequences that have been given room for `count` further tokens each. Raises CannotRecord."""
        runner, dynamic = self._runner, isinstance(tree, tuple)
        lengths = [runner.cache.length(sequence) for sequence in sequences]
        num_rows = 1 << (len(sequences) - 1).bit_length()
        capacity = max(MIN_CAPACITY, 1 << (max(lengths) - 1).bit_length())
        key = num_rows, count, capacity, hidden, tuple(x.shape[1:] for x in tree) if dynamic else tree
        forward = self.shelf.get(key, lambda: _Forward(runner, num_rows, count, capacity, tree, hidden))
        return forward(sequences, [length - count for length in lengths], tokens, tree)


class _Forward:
    """One recording and the tensors that it reads."""

    def __init__(self, runner, num_rows: int, count: int, capacity: int, tree: TokenTree | tuple[Tensor, Tensor] | None, hidden: bool):
        self._runner, self._hidden, self._tree = runner, hidden, tree
        with torch.inference_mode(False):
            alive = torch.zeros(num_rows, dtype=torch.bool, device=runner.device)
            self._tokens = torch.zeros(num_rows, count, dtype=torch.int64, device=runner.device)
            if isinstance(tree, tuple):
                self._tree = tuple(torch.zeros(num_rows, *x.shape[1:], dtype=torch.int64, device=runner.device) for x in tree)
        self.rows = DeviceSequences(runner.cache, capacity, alive)
        self._recorded = Recorded(self._run, runner.device, runner.graph_pool, f"a forward of {type(runner.model).__name__}")

    def _run(self):
        return self._runner.forward_rows(self.rows, self._tokens, self._tree, hidden=self._hidden)

    def __call__(self, sequences: Sequence[int], lengths: Sequence[int], tokens: Tensor, tree: tuple[Tensor, Tensor] | TokenTree | None):
        count = len(sequences)
        self.rows.load(sequences, lengths)
        self._tokens[:count] = tokens.view(count, -1)
        if isinstance(tree, tuple):
            for mine, given in zip(self._tree, tree, strict=True):
                mine[:count] = given
        out = self._recorded()
        # the next replay of any graph may overwrite what this one returned
        return type(out)(*(None if x is None else x[:count].flatten(0, 1).clone() for x in (out.logits, out.hidden)))
