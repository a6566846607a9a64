"""Forwards of a model as CUDA graphs, for rounds that the host takes part in: one recording for each number of
sequences, tokens and tree.

The host writes block tables, lengths and tokens into tensors that stay, and one launch does the rest. A forward is
recorded when it is asked for the second time. Rounds that need no host are recorded whole instead
(`specdec.rounds.captured`)."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from attention.paged.batch import StaticBatch
from attention.paged.device_batch import DeviceSequences
from specdec.cuda_graph import CapturedGraph, GraphCache, round_up
from specdec.trees.tree import TokenTree

MAX_TOKENS = 1024  # of one forward: beyond, launches no longer count
MAX_LOGITS = 1 << 26  # numbers that a recording returns, and holds as long as it lives
MIN_TOKENS = 32  # of a recorded forward over prompts
MIN_CAPACITY = 1024  # tokens of a sequence that a recording has room for, then the next powers of two


class ForwardGraphs:
    """The recordings of one `ModelRunner`, made when they are first asked for."""

    KEPT = 64

    def __init__(self, runner):
        self._runner, self.shelf, self._met = runner, GraphCache(self.KEPT), set()

    def worth(self, tokens: int, logits: int) -> bool:
        """Whether a forward over so many tokens that gives so many rows of logits is one to record."""
        return tokens <= MAX_TOKENS and logits * self._runner.vocab_size <= MAX_LOGITS

    @property
    def records_prompts(self) -> bool:
        """Whether there is anything to gain: where nothing is recorded, padding only costs."""
        return self._runner.device.type == "cuda"

    def _recording(self, key: Hashable, make: Callable):
        if key in self._met:
            return self.shelf.get(key, make)
        self._met.add(key)
        return None

    def run_prompts(
        self,
        sequences: Sequence[int],
        tokens: Tensor,
        counts: Sequence[int],
        tree: TokenTree | None,
        keep: Tensor,
        hidden: bool,
    ):
        """`ModelRunner.forward` over unlike numbers of new tokens, prompts mostly, together at most MAX_TOKENS; None:
        not recorded yet.

        `keep [M]` are the packed indices whose logits are wanted. Raises CannotRecord.
        """
        runner, total = self._runner, round_up(sum(counts), MIN_TOKENS)
        capacity = max(MIN_CAPACITY, 1 << (max(map(runner.cache.length, sequences)) - 1).bit_length())
        key = "prompts", len(sequences), total, capacity, tree, len(keep), hidden
        forward = self._recording(
            key, lambda: _PromptForward(runner, len(sequences), total, capacity, tree, len(keep), hidden)
        )
        return None if forward is None else forward(sequences, counts, tokens, keep)

    def run(
        self,
        sequences: Sequence[int],
        tokens: Tensor,
        count: int,
        tree: TokenTree | tuple[Tensor, Tensor] | None,
        hidden: bool,
    ):
        """`ModelRunner.forward` over sequences that have been given room for `count` further tokens each; None: not
        recorded yet. Raises CannotRecord.
        """
        runner, dynamic = self._runner, isinstance(tree, tuple)
        lengths = [runner.cache.length(sequence) for sequence in sequences]
        num_rows = 1 << (len(sequences) - 1).bit_length()
        capacity = max(MIN_CAPACITY, 1 << (max(lengths) - 1).bit_length())
        key = (
            num_rows,
            count,
            capacity,
            hidden,
            runner.compiles_forwards,
            tuple(x.shape[1:] for x in tree) if dynamic else tree,
        )
        forward = self._recording(key, lambda: _Forward(runner, num_rows, count, capacity, tree, hidden))
        return None if forward is None else forward(sequences, [length - count for length in lengths], tokens, tree)


class _Forward:
    """One recording and the tensors that it reads."""

    def __init__(
        self,
        runner,
        num_rows: int,
        count: int,
        capacity: int,
        tree: TokenTree | tuple[Tensor, Tensor] | None,
        hidden: bool,
    ):
        self._runner, self._hidden, self._tree, self._compiled = runner, hidden, tree, runner.compiles_forwards
        with torch.inference_mode(False):
            alive = torch.zeros(num_rows, dtype=torch.bool, device=runner.device)
            self._tokens = torch.zeros(num_rows, count, dtype=torch.int64, device=runner.device)
            if isinstance(tree, tuple):
                self._tree = tuple(
                    torch.zeros(num_rows, *x.shape[1:], dtype=torch.int64, device=runner.device) for x in tree
                )
        self.rows = DeviceSequences(runner.cache, capacity, alive)
        self._recorded = CapturedGraph(self._run, runner.device, runner.graph_pool, f"a forward of {runner.name}")

    def _run(self):
        return self._runner.forward_rows(
            self.rows, self._tokens, self._tree, hidden=self._hidden, compiled=self._compiled
        )

    def __call__(
        self,
        sequences: Sequence[int],
        lengths: Sequence[int],
        tokens: Tensor,
        tree: tuple[Tensor, Tensor] | TokenTree | None,
    ):
        count = len(sequences)
        self.rows.load(sequences, lengths)
        self._tokens[:count] = tokens.view(count, -1)
        if isinstance(tree, tuple):
            for mine, given in zip(self._tree, tree, strict=True):
                mine[:count] = given
        # the next replay of any may overwrite what this one returned
        return self._recorded().each(lambda x: x[:count].flatten(0, 1).clone())


class _PromptForward:
    """The same for `total` packed tokens of sequences that need not have the same number of them."""

    def __init__(self, runner, count: int, total: int, capacity: int, tree: TokenTree | None, kept: int, hidden: bool):
        self._runner, self._hidden = runner, hidden
        self._trees = None if tree is None else [(tree.depths, tree.bits)] * count
        words, nodes = (0, 0) if tree is None else (len(tree.bits[0]), count * tree.size)
        self._static = StaticBatch(runner.cache, count, total, runner.cache.pages_for(capacity), words, nodes)
        with torch.inference_mode(False):
            self._tokens = torch.zeros(total, dtype=torch.int64, device=runner.device)
            self._keep = torch.zeros(kept, dtype=torch.int64, device=runner.device)
        self._recorded = CapturedGraph(self._run, runner.device, runner.graph_pool, f"a forward of {runner.name}")

    def _run(self):
        self._static.batch.forget()
        return self._runner.forward_batch(self._tokens, self._static.batch, self._keep, self._hidden)

    def __call__(self, sequences: Sequence[int], counts: Sequence[int], tokens: Tensor, keep: Tensor):
        self._static.load(sequences, counts, self._trees)
        self._tokens[: len(tokens)] = tokens
        self._keep.copy_(keep)
        return self._recorded().each(torch.clone)
