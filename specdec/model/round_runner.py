"""What rounds and engines use of a model bound to a cache, be it a `ModelRunner` or a `FeatureRunner`."""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from attention import PagedKVCache
from attention.kv.page_format import PageFormat
from specdec.model.graph_runner import GraphHolder
from specdec.model.runner import ModelRunner


class RoundRunner(Protocol):
    """A model and the cache that its forwards append to.

    graph_holders: what has captured the model in rounds, and drops them when cache or weights move.
    compiles_forwards: whether forwards of rounds on the host are worth compiling.
    """

    graph_holders: "weakref.WeakSet[GraphHolder]"
    compiles_forwards: bool

    @property
    def model(self) -> nn.Module:
        """The module with the weights."""

    @property
    def lock(self) -> AbstractContextManager:
        """Held during a `generate` call."""

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""

    @property
    def cache(self) -> PagedKVCache:
        """The cache. Raises RuntimeError before `reserve`."""

    @property
    def borrows_cache(self) -> bool:
        """Whether the cache is another runner's."""

    @property
    def page_size(self) -> int:
        """Tokens of a page."""

    @property
    def page_format(self) -> PageFormat:
        """What a page of the cache holds."""

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text that it can run (None: no limit)."""

    @property
    def window(self) -> int | None:
        """Tokens that the largest sliding window shows, where every layer has one (None: no window)."""

    @property
    def hooked(self) -> bool:
        """Whether the model has hooks."""

    @property
    def graphs_captured(self) -> int:
        """Number of forwards captured so far."""

    def match_mode(self, target: ModelRunner) -> None:
        """Take over the mode of `target`, which may move the weights."""

    def explain(self) -> str:
        """How its forwards run, in words."""

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for sequences of these lengths."""

    def allocate(self, num_pages: int | None, cells: int | None = None) -> None:
        """Keep a cache of exactly `num_pages` from now on; None: of whatever size calls need.

        cells: sequences that have a recurrent state at the same time (None: as many as there are)."""

    @property
    def recurrent(self) -> bool:
        """Whether the model keeps recurrent states beside keys and values."""
