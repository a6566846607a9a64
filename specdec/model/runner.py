"""A transformers model bound to a paged cache: packed ragged tokens in, logits and hidden states out."""

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from attention import AttentionBatch, ModelAdapter, PagedKVCache
from attention.gpu import on
from attention.kv.cache import DEFAULT_PAGE_SIZE
from attention.kv.page_format import PageFormat
from attention.kv.quantization import storage_dtype
from attention.kv.window import KeyWindow
from attention.paged.batch import build_batch
from attention.paged.device_batch import DeviceSequences
from attention.recording import direct_kernels
from specdec.cuda_graph import CannotCapture, CapturedGraph, up_to_power
from specdec.model import prefill
from specdec.model.execution import Execution
from specdec.model.features import Features
from specdec.model.fingerprint import has_hooks
from specdec.model.fusion.quantised.activations import quantises_activations, require_token_scales
from specdec.model.graph_runner import MAX_TOKENS, GraphHolder, GraphRunner, capture_name
from specdec.model.modes import MODES
from specdec.model.output import RunnerOutput
from specdec.model.own_cache import OwnCache
from specdec.model.parallel import ranks_of
from specdec.trees.tensors import Tree, TreeMask

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

Result = TypeVar("Result")


class ModelRunner:
    """Runs a causal language model over its own `PagedKVCache`.

    The cache is made by `reserve`, which also enlarges it while it holds no sequence; with `num_pages` its size is
    fixed. `kv_dtype` "int8" or "fp8" stores keys and values in 8 bits: outputs are then close to, but not equal to,
    those over a full-precision cache. `mode` is one of:

    * "eager": the model's own modules run, operation by operation;
    * "graph": forwards and whole rounds are captured, as CUDA graphs or, on a CPU, as lists of operations;
    * "compile": the same, with the model's blocks compiled by torch.compile, or, on a CPU, with kernels in C;
    * "auto": on a CPU with a C compiler "compile", else "graph"; what cannot be captured runs eagerly after a warning,
      a model whose weights are split over ranks (`specdec.model.parallel`) without one.

    In "graph" and "compile", unless `fuse` is False, operations are fused (`specdec.model.fusion`), with the same
    results up to rounding; `model` then uses views of the fused weights (on a CPU, small ones may be copied instead).
    Captured code is the model's arithmetic: what its Python does besides happens once. Changed weights, settings and
    hooks are noticed when `generate` is called (`refresh`), not by `forward`. `dtype` is that of keys and values: of
    activations, however weights are stored. Activations in 8 bits make near-ties as 16-bit ones do (`explain`).

    Raises `attention.UnsupportedArchitecture` where pages cannot serve a model, ValueError for one in training mode
    or with activations in 8 bits that are scaled per tensor.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> runner = specdec.ModelRunner(pair.target)
    >>> runner.reserve([8])
    >>> sequence = runner.cache.add()
    >>> runner.forward([sequence], torch.tensor([5, 6, 7]), [3]).logits.shape
    torch.Size([3, 4096])
    """

    PREFILL_CHUNK = 1024  # prompt tokens of one sequence in one forward
    PREFILL_TOKENS = 16384  # prompt tokens of all sequences in one forward
    MAX_TREE = 1024  # nodes of a tree: 16 words of ancestor bits for each node

    def __init__(self, model: "PreTrainedModel", page_size: int = DEFAULT_PAGE_SIZE, num_pages: int | None = None,
                 kv_dtype: str | None = None, mode: str = "auto", fuse: bool = True,
                 sees: KeyWindow | None = None):  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a transformers model is wanted (specdec.load_model reads one from a folder or the hub), got {model!r}"
            )
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        if mode not in ("auto", *MODES):
            raise ValueError(f"mode must be one of auto, {', '.join(MODES)}, got {mode!r}")
        storage_dtype(kv_dtype, torch.float32)  # raises for an unknown name
        self.model, self.ranks = model, ranks_of(model)
        self.require_eval_mode()
        require_token_scales(model)
        self.adapter = ModelAdapter(model, coarse=quantises_activations(model))
        self.vocab_size, self.device, self.dtype = self.adapter.vocab_size, self.adapter.device, self.adapter.dtype
        self.recurrent = bool(self.adapter.layout.recurrent)  # whether it keeps states beside keys and values
        self.limit, self.max_positions, self.kv_dtype = self.adapter.limit, self.adapter.max_positions, kv_dtype
        self.borrows_cache = False  # whether it runs in another runner's cache, see `share_cache`
        self.remarks = ""  # what `explain` says at its end, of whoever made the model
        self.lock = threading.RLock()  # held during a `generate` call: cache, twin and graphs serve one at a time
        self._graphs = GraphRunner(self)
        self.compiles_forwards = True  # whether mode "compile" includes the forwards of rounds that the host runs
        self.graph_holders: weakref.WeakSet[GraphHolder] = weakref.WeakSet()
        pages = PageFormat(self.adapter.layout, page_size, self.dtype, kv_dtype)
        self._own = OwnCache(pages, self.device, self.drop_graphs, num_pages, sees, self.adapter.all_devices)
        if sees is not None and sees.sinks and self.adapter.has_windows:
            raise ValueError(
                f"{type(model).__name__} has sliding windows, beside which there are no {sees.sinks} sinks"
            )
        self.execution = Execution(model, self.adapter, self.ranks, mode, fuse, self.drop_graphs)

    def require_eval_mode(self) -> None:
        """Raise ValueError when the model is in training mode."""
        if self.model.training:
            raise ValueError(
                f"{type(self.model).__name__} is in training mode, so dropout would change its output; call "
                "model.eval() first"
            )

    @property
    def mode(self) -> str:
        """How forwards run: one of MODES. Setting it ends "auto"."""
        return self.execution.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self.execution.mode = mode

    @property
    def hooked(self) -> bool:
        """Whether the model has hooks, or PyTorch hooks for all modules."""
        return has_hooks(self.model)

    @property
    def auto(self) -> bool:
        """Whether the mode is "auto": what cannot be captured then runs eagerly."""
        return self.execution.auto

    @property
    def output_layer(self) -> nn.Module:
        """The layer that turns hidden states into logits, as forwards of this mode run it."""
        return self.execution.fusion.output_layer

    def fused(self, module: nn.Module) -> nn.Module:
        """A twin of `module` with this mode's linear products; `module` itself where nothing is fused."""
        return self.execution.fused(module)

    def explain(self) -> str:
        """A table of what is fused in this mode ("eager": in "graph"), or why not, and of what cannot be captured."""
        return "\n".join(filter(None, (self.execution.explain(), self.remarks)))

    def refresh(self) -> None:
        """Rebuild twin and graphs if the model's weights, modules, settings, hooks or adapters have changed.

        Called at the start of `generate`. With "auto", a model with hooks runs eagerly: replays call no hooks."""
        self.execution.refresh()

    def drop_graphs(self) -> None:
        """Drop all graphs of this model, those of `graph_holders` too: they hold the cache and addresses of weights."""
        for graphs in (self._graphs, *self.graph_holders):
            graphs.drop_graphs()

    def fall_back(self, error: CannotCapture) -> None:
        """With "auto", warn that a capture failed and eager execution follows; raise `error` in any other mode."""
        self.execution.fall_back(error)

    def match_mode(self, target: "ModelRunner") -> None:
        """Take over the mode of `target` before a `generate` call; in "auto", a draft model with hooks runs eagerly.

        On a device of another type "auto" decides what a mode other than "eager" is."""
        self.execution.match(target.execution)

    @property
    def cache(self) -> PagedKVCache:
        """The cache that holds the sequences. Raises RuntimeError before `reserve`."""
        return self._own.cache

    def share_cache(self, target: "ModelRunner") -> None:
        """Use the cache of `target` instead of an own one."""
        self._own.share(target.cache)

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for sequences of these lengths, by a larger cache if the present one holds no sequence.

        Where that is not possible, appending tokens raises `attention.OutOfPages` once the pages run out."""
        self._own.reserve(lengths, spare=self.mode != "eager")

    def allocate(self, num_pages: int | None, cells: int | None = None) -> None:
        """Keep a cache of exactly `num_pages` from now on; None: of whatever size calls need, none to begin with.

        `cells`: sequences that have a recurrent state at a time (None: as many as there are). Raises RuntimeError while
        the present cache holds sequences."""
        self._own.allocate(num_pages, cells)

    def require_rollback(self, tokens: int) -> None:
        """Let so many last tokens of a sequence be taken back, in recurrent states too, without running it again."""
        self._own.require_rollback(tokens)

    @property
    def page_size(self) -> int:
        """Tokens of a page. Setting it replaces the cache, which must hold no sequence then."""
        return self._own.format.page_size

    @page_size.setter
    def page_size(self, tokens: int) -> None:
        self._own.change_page_size(tokens)

    @property
    def page_format(self) -> PageFormat:
        """What a page of the cache holds, for `pages_within`."""
        return self._own.format

    @property
    def window(self) -> int | None:
        """Tokens that the largest sliding window shows, where every layer has one; see `ModelAdapter`."""
        own, sees = self.adapter.window, self._own.sees
        return own if sees is None else min(sees.size, own or sees.size)

    def forward(self, sequences: Sequence[int], tokens: Tensor, counts: Sequence[int], tree: Tree = None,
                keep: Tensor | None = None, features: Features | None = None,
                capture: bool = True, prompts: bool = False) -> RunnerOutput:  # fmt: skip
        """Append `counts[i]` new tokens to each sequence and run the model over them.

        tokens: `[sum(counts)]`, packed in the order of `sequences`.
        tree: shape of the last tokens of every sequence, of which the first may be in the cache already.
        keep: `[M]`, packed indices of the tokens whose logits are returned (None: all).
        features: hidden states to return as `[M, sum of widths]`; with tokens "prompt" those of all tokens.
        capture: whether a graph pays: not for a forward like which there will be few, of rounds beside prompts.
        prompts: the tokens are of prompts, whose graphs are padded to few sizes.

        Raises ValueError for a tree of more than MAX_TREE nodes or a layer that the model does not have, and
        `attention.OutOfPages`, in all cases before anything is appended."""
        mask = self._mask(tree)
        if features is not None:
            self.adapter.hidden_layers(features.layers)  # raises for a layer that the model does not have
        with on(self.device):  # a draft model's may not be the current one
            self.cache.append(sequences, counts)
            if self.mode != "eager" and capture:
                try:
                    out = self._graphs.run(sequences, tokens, counts, mask, keep, features, prompts)
                    if out is not None:
                        return out
                except CannotCapture as error:
                    self.fall_back(error)
            batch = build_batch(self.cache, sequences, counts, mask.tensors or mask.of_rows(len(counts)))
            return self.forward_batch(tokens, batch, keep, features)

    def forward_rows(self, rows: DeviceSequences, tokens: Tensor, tree: Tree = None, last_only: bool = False,
                     features: Features | None = None, compiled: bool = True) -> RunnerOutput:  # fmt: skip
        """Append `tokens [B, n]` to sequences whose lengths are on the device. Never synchronises with the device.

        Returns logits `[B, n, V]` (`[B, 1, V]` with `last_only`) and features `[B, n, sum of widths]`. `tree` and
        `features` are those of `forward`. In mode "compile" the compiled model runs, unless `compiled` is False."""
        (count, width), compiled = tokens.shape, compiled and self.mode == "compile"
        batch = rows.append(width, self._mask(tree).on_device(self.device))
        keep = torch.arange(1, count + 1, device=self.device) * width - 1 if last_only else None
        out = self.forward_batch(tokens.flatten(), batch, keep, features, compiled)
        return out.map(lambda x: x.unflatten(0, (count, -1)))

    def forward_batch(self, tokens: Tensor, batch: AttentionBatch, keep: Tensor | None = None,
                      features: Features | None = None, compiled: bool = False) -> RunnerOutput:  # fmt: skip
        """Run packed `tokens [T]` described by `batch`; logits `[M, V]` at packed indices `keep [M]` (None: all)."""
        positions = batch.shifted_positions if self.adapter.moves_positions else batch.positions
        if self.max_positions is not None and batch.max_kv_length > self.max_positions:
            positions = positions.clamp(max=self.max_positions - 1)  # of tokens that are never kept
        with direct_kernels(self.mode == "compile" and self.device.type == "cpu"):
            if features is None:
                return RunnerOutput(self.adapter.forward(tokens, positions, batch, keep, compiled))
            forward, all_tokens = self.adapter.forward_with_features, features.tokens == "prompt"
            return RunnerOutput(*forward(tokens, positions, batch, keep, features.layers, all_tokens, compiled))

    def _mask(self, tree: Tree) -> TreeMask:
        mask = TreeMask.of(tree)
        if mask.size > self.MAX_TREE:
            raise ValueError(f"a tree may have {self.MAX_TREE} nodes, got {mask.size}")
        return mask

    def extend(self, sequences: Sequence[int], tokens: Sequence[Tensor]) -> Tensor:
        """Append each sequence's own `tokens [n]`, in chunks -> logits `[B, V]` after the last (`prefill.extend`)."""
        return prefill.extend(self, sequences, tokens)

    def slots_for(self, count: int) -> int:
        """Rows of a graph for `count` rows: few graphs matter on a GPU, and on a CPU that a row too many costs time."""
        return count if self.device.type == "cpu" else up_to_power(count)

    def capture(self, function: Callable[[], Result], what: str) -> CapturedGraph[Result]:
        """`function`, `what` for messages, as a graph in this runner's pool. Raises CannotCapture."""
        what = f"{what} of {capture_name(self.model)}"
        return CapturedGraph(function, self.device, self.graph_pool, what, compiled=self.mode == "compile")

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of prompts up to which one forward may be captured; None if none are."""
        return MAX_TOKENS if self.mode != "eager" and self._graphs.captures_ragged else None

    @cached_property
    def graph_pool(self):
        """The memory pool that all CUDA graphs of this runner share; None on a CPU."""
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @property
    def graphs_captured(self) -> int:
        """Number of forwards captured so far."""
        return self._graphs.graphs.count
