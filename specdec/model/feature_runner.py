"""A draft model that reads the target's features, bound to a paged cache of its own (EAGLE-3, MTP)."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from attention import AttentionBatch, PagedKVCache
from attention.gpu import on
from attention.kv.cache import DEFAULT_PAGE_SIZE
from attention.kv.layout import LayerLayout
from attention.kv.page_format import PageFormat
from attention.kv.window import KeyWindow
from attention.paged.batch import build_batch
from attention.paged.device_batch import DeviceSequences
from attention.paged.layer import store_and_attend
from attention.recording import direct_kernels
from specdec.model.features import Features
from specdec.model.fingerprint import has_hooks
from specdec.model.graph_runner import GraphHolder
from specdec.model.own_cache import OwnCache
from specdec.model.runner import ModelRunner
from specdec.trees.tensors import Tree, TreeMask

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class FeatureTraits:
    """What runners and drafters need to know about a `FeatureModel`.

    features: which of the target's hidden states it reads, of "prompt" tokens.
    layout: what its own layers keep of a step.
    vocab_size: the target's.
    dtype: that of its states, keys and values.
    max_length: tokens of the longest text that it drafts for (None: no limit).
    tokens_ahead: tokens after that of its features which a step of a text reads (D). With more than one, `tokens` of
        steps that are fed with features are `[T, D]`; the last D - 1 steps of a text read what nobody knows yet, and
        run again once it is known."""

    features: Features
    layout: LayerLayout
    vocab_size: int
    dtype: torch.dtype
    max_length: int | None
    tokens_ahead: int = 1


class FeatureModel(Protocol):
    """A model of a few layers that drafts from the target's features. T: packed tokens; h: its hidden size.

    A step of token i + 1 reads its embedding and a state of token i: the target's features `[T, F]`, or, for tokens
    that the target has not run, what its own step of token i gave. It predicts token i + 2.
    """

    @property
    def module(self) -> nn.Module:
        """What holds its weights."""

    @property
    def traits(self) -> FeatureTraits:
        """See `FeatureTraits`."""

    def step(self, tokens: Tensor, states: Tensor, fed: bool, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """`tokens [T]` and features `[T, F]` if `fed`, else hidden `[T, h]` -> output and hidden `[T, h]`.

        Positions are those of `batch`; layers attend by `attend_over(batch)`, once each."""

    def logits(self, output: Tensor) -> Tensor:
        """`output [M, h]` -> logits over the target's tokens `[M, V]`, -inf for those that are never drafted."""

    @property
    def ids(self) -> Tensor | None:
        """`[V']` int64: the target's ids of the tokens that it can draft (None: all, in their order)."""

    def own_logits(self, output: Tensor) -> Tensor:
        """`output [M, h]` -> logits over the tokens that it can draft `[M, V']`."""

    def fused(self, fuse: Callable[[nn.Module], nn.Module]) -> "FeatureModel":
        """The same model with modules that `fuse` (`ModelRunner.fused`) gives; called when a session starts."""


def attend_over(batch: AttentionBatch, scale: float | None = None,
                windows: Sequence[int | None] | None = None) -> Attend:  # fmt: skip
    """Attention of the layers of a `FeatureModel` over its pages.

    attend(layer, `q [T, H, D]`, `k [T, G, D]`, `v [T, G, Dv]`, both rotated) -> `[T, H, Dv]`; it stores k and v.
    scale: None: D^-0.5; windows: of each layer, how many tokens one sees, itself included (None: all)."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, by = None if windows is None else windows[layer], q.shape[-1] ** -0.5 if scale is None else scale
        return store_and_attend(batch, layer, q, k, v, by, window)

    return attend


class FeatureRunner:
    """Runs a `FeatureModel` over its own cache, as `ModelRunner` runs a language model.

    `kv_dtype` is that of its pages, `sees` what of them a step attends to. Forwards run operation by operation, or
    inside a round that is captured whole."""

    max_positions = None
    borrows_cache = recurrent = False

    def __init__(self, source: FeatureModel, page_size: int = DEFAULT_PAGE_SIZE, kv_dtype: str | None = None,
                 sees: KeyWindow | None = None):  # fmt: skip
        self.source, self._runs = source, source
        self._fused_for: tuple | None = None  # what `_runs` depends on
        self.device = next(source.module.parameters()).device
        self.compiles_forwards, self.graphs_captured = False, 0
        self.lock = threading.RLock()
        self.graph_holders: weakref.WeakSet[GraphHolder] = weakref.WeakSet()
        self._graphed = self._direct = False
        format = PageFormat(source.traits.layout, page_size, source.traits.dtype, kv_dtype)
        self._own = OwnCache(format, self.device, self.drop_graphs, sees=sees)

    @property
    def model(self) -> nn.Module:
        """The module with the weights."""
        return self.source.module

    @property
    def hooked(self) -> bool:
        """Whether the module has hooks."""
        return has_hooks(self.source.module)

    @property
    def reads(self) -> tuple[int, ...]:
        """Addresses of all weights, see `DraftSession.reads`."""
        return tuple(parameter.data_ptr() for parameter in self.source.module.parameters())

    @property
    def window(self) -> int | None:
        """See `ModelRunner.window`."""
        return None if self._own.sees is None else self._own.sees.size

    @property
    def page_size(self) -> int:
        """See `ModelRunner.page_size`."""
        return self._own.format.page_size

    @page_size.setter
    def page_size(self, tokens: int) -> None:
        self._own.change_page_size(tokens)

    @property
    def page_format(self) -> PageFormat:
        """What a page of the cache holds, for `pages_within`."""
        return self._own.format

    @property
    def cache(self) -> PagedKVCache:
        """The cache that holds the sequences. Raises RuntimeError before `reserve`."""
        return self._own.cache

    def reserve(self, lengths: Sequence[int]) -> None:
        """See `ModelRunner.reserve`."""
        self._own.reserve(lengths, spare=self._graphed)

    def allocate(self, num_pages: int | None, cells: int | None = None) -> None:
        """See `ModelRunner.allocate`."""
        self._own.allocate(num_pages, cells)

    def explain(self) -> str:
        """How its forwards run, in words."""
        layers, name = len(self._own.format.layout.layers), type(self.model).__name__
        how = "captured with rounds" if self._graphed else "operation by operation"
        return f"{name} on {self.device}, {layers} layers over features {self.source.traits.features.layers}: {how}"

    def drop_graphs(self) -> None:
        """Drop the captured rounds that run this model: they hold the cache and addresses of weights."""
        for holder in self.graph_holders:
            holder.drop_graphs()

    def match_pages(self, target: ModelRunner) -> None:
        """Take the page size of `target`, with whose prefixes those of this cache are shared, unless it is in use."""
        if self._own.held is None or not self._own.held.sequences:
            self.page_size = target.page_size

    def match_mode(self, target: ModelRunner) -> None:
        """Take over the mode of `target` before a call."""
        self._graphed, self._direct = target.mode != "eager", target.mode == "compile" and self.device.type == "cpu"
        if self._fused_for != (wanted := (target.execution.fuses, self.hooked)) + (self.reads,):
            self._runs = self.source.fused(target.fused)  # may move weights
            self._fused_for = (*wanted, self.reads)

    def forward(self, sequences: Sequence[int], tokens: Tensor, states: Tensor, fed: bool, counts: Sequence[int],
                tree: Tree = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Append `counts[i]` new steps to each sequence and run the model over them -> output and hidden `[T, h]`.

        `tokens [T]` and `states [T, …]`, see `FeatureModel.step`, are packed in the order of `sequences`; `tree` is
        that of `ModelRunner.forward`. Raises `attention.OutOfPages` before anything is appended."""
        return self._step(tokens, states, fed, self.appended(sequences, counts, tree))

    def forward_rows(self, rows: DeviceSequences, tokens: Tensor, states: Tensor, fed: bool,
                     tree: Tree = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Append `tokens [B, n]` to sequences whose lengths are on the device -> output and hidden `[B, n, h]`."""
        shape = tokens.shape[:2]
        output, hidden = self._step(tokens.flatten(0, 1), states.flatten(0, 1), fed,
                                    self.appended_rows(rows, shape[1], tree))  # fmt: skip
        return output.unflatten(0, shape), hidden.unflatten(0, shape)

    def appended(self, sequences: Sequence[int], counts: Sequence[int], tree: Tree = None) -> AttentionBatch:
        """Append `counts[i]` new steps to each sequence: the batch of a forward over them."""
        self.cache.append(sequences, counts)
        mask = TreeMask.of(tree)
        return build_batch(self.cache, sequences, counts, mask.tensors or mask.of_rows(len(counts)))

    def appended_rows(self, rows: DeviceSequences, count: int, tree: Tree = None) -> AttentionBatch:
        """The same of `count` new steps of sequences whose lengths are on the device."""
        return rows.append(count, TreeMask.of(tree).on_device(self.device))

    def _step(self, tokens: Tensor, states: Tensor, fed: bool, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        return self.run(lambda model: model.step(tokens, states, fed, batch))

    def run(self, forward: Callable[[FeatureModel], Out]) -> Out:
        """`forward(model)` with what runs the model in this mode, on its device: for a pass that is not a step."""
        with on(self.device), direct_kernels(self._direct):
            return forward(self._runs)

    def logits(self, output: Tensor, own: bool = False) -> Tensor:
        """`output [..., h]` -> logits `[..., V]`, or of its own tokens alone, `FeatureModel.ids`: `[..., V']`."""
        flat, shape = output.flatten(0, -2), output.shape[:-1]
        return self.run(lambda model: (model.own_logits if own else model.logits)(flat).unflatten(0, shape))
