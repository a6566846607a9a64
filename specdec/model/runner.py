"""A transformers model bound to a paged cache: packed ragged tokens in, logits and hidden states out."""

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from attention import AttentionBatch, ModelAdapter, PagedKVCache
from attention.gpu import on
from attention.hf.twin import ATTENTION_SETTING, configs_of, make_twin
from attention.kv.cache import DEFAULT_PAGE_SIZE
from attention.kv.quantization import storage_dtype
from attention.paged.batch import build_batch
from attention.paged.device_batch import DeviceSequences
from specdec.cuda_graph import CannotCapture, keep_alive, round_up
from specdec.model.forward_graphs import ForwardGraphs
from specdec.model.fusion.compiled_blocks import compile_blocks
from specdec.model.fusion.notes import Note, table, warn_of_lost
from specdec.model.fusion.pointwise import fuse_pointwise
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.skinny_linear import skinny_linear
from specdec.trees.tensors import TreeBatch, node_tables
from specdec.trees.tree import TokenTree

MODES = ("eager", "graph", "compile")
# tokens of a sequence: so many catch up in a recorded forward, though only the last one's logits are wanted
SHORT_PROMPT = 16
_BUILDING = (
    threading.Lock()
)  # one twin is made at a time: joining moves weights, and two of one model would move them at once
MIN_PAGES = 16  # of a cache that recordings read


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """`logits [M, V]` at the kept tokens and, where asked for, `hidden [M, hidden]`: what the output embedding read
    there.
    """

    logits: Tensor
    hidden: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> "RunnerOutput":
        """`function` of both, of what there is."""
        return RunnerOutput(*(None if x is None else function(x) for x in (self.logits, self.hidden)))


class ModelRunner:
    """Runs a causal language model over its own `PagedKVCache`.

    The cache is made on first use and grows when no sequence is alive; with `num_pages` its size is fixed. `kv_dtype`
    "int8" or "fp8" stores keys and values in 8 bits: the model is then that model over a quantised cache, its logits
    close to, but not those of, the full-precision one. `mode` "eager" launches kernel by kernel; "graph" lets whole
    rounds run on the device, recorded as CUDA graphs; "compile" does so with the model's blocks through torch.compile
    (on a CPU too, where nothing is recorded). "auto" is "graph" on a GPU, where what cannot be recorded is launched
    kernel by kernel with a warning, and "eager" on a CPU. In "graph" and "compile", projections that read the same
    input are joined into one product, products of few rows have kernels of their own (in "graph" with what is added to
    them), and so have norms, rotations and gates, and sines and cosines come from a table, unless `fuse` is False: the
    same up to rounding. `model` goes on with views of the joined weights.

    Raises `attention.UnsupportedArchitecture` for a model that cannot run over pages and ValueError for one in training
    mode.

    >>> import specdec
    >>> pair = specdec.load_tiny_pair()
    >>> runner = specdec.ModelRunner(pair.target)
    >>> runner.reserve([8])
    >>> sequence = runner.cache.add()
    >>> runner.forward([sequence], torch.tensor([5, 6, 7]), [3]).logits.shape
    torch.Size([3, 4096])
    """

    PREFILL_CHUNK = 1024  # prompt tokens of one sequence that go into one forward
    PREFILL_TOKENS = 16384  # and of all sequences
    MAX_TREE = 1024  # nodes of one tree: 16 words of ancestor bits a node

    def __init__(
        self,
        model,
        page_size: int = DEFAULT_PAGE_SIZE,
        num_pages: int | None = None,
        kv_dtype: str | None = None,
        mode: str = "auto",
        fuse: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a transformers model is wanted (specdec.load_model reads one from a folder or the hub), got {model!r}"
            )
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        gpu = model.device.type == "cuda"
        if mode not in ("auto", *MODES) or mode == "graph" and not gpu:
            raise ValueError(
                f"mode must be one of auto, {', '.join(MODES)}, and graphs need a GPU; got {mode!r} for a "
                f"model on {model.device}"
            )
        storage_dtype(kv_dtype, torch.float32)  # refuses an unknown one
        self.model = model
        self.require_eval_mode()
        self.adapter = ModelAdapter(model)
        self.vocab_size = self.adapter.vocab_size
        self.device = model.device
        self.dtype = next(model.parameters()).dtype
        self.limit, self.max_positions = self.adapter.limit, self.adapter.max_positions
        self.page_size = page_size
        self.kv_dtype = kv_dtype
        self._fuse, self._auto = fuse, mode == "auto"
        self.lock = threading.RLock()  # held while a call decodes: cache, twin and recordings serve one at a time
        self._graphs = ForwardGraphs(self)
        self.compiles_forwards = True  # in mode "compile", also those of rounds that the host takes part in
        self.readers = weakref.WeakSet()  # whoever else records this model, and is to forget it with `forget`
        self.cache: PagedKVCache | None = None
        self._switch(mode if not self._auto else "graph" if gpu else "eager")
        self._fixed_pages = num_pages

    def require_eval_mode(self) -> None:
        """Raise ValueError when the model is in training mode."""
        if self.model.training:
            raise ValueError(
                f"{type(self.model).__name__} is in training mode, so dropout would change its output; call "
                "model.eval() first"
            )

    @property
    def name(self) -> str:
        """The model's class, for messages; with experts also how these run, since some ways ask the device."""
        model = self.model
        experts = getattr(model.config.get_text_config(), "_experts_implementation", None)
        if (
            experts is None
            or experts == "batched_mm"
            or not getattr(type(model), "_can_set_experts_implementation", lambda: False)()
        ):
            return type(model).__name__
        return (
            f"{type(model).__name__} with {experts} experts "
            '(model.set_experts_implementation("batched_mm") asks the device nothing)'
        )

    @property
    def mode(self) -> str:
        """How forwards are run: one of MODES."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self._auto = False
        self._switch(mode)

    def _switch(self, mode: str) -> None:
        self._mode = mode
        self.forget()
        with _BUILDING, on(self.device):
            twin = self.adapter.renew()
            self._notes: list[Note] = []
            fused = fuse_projections(twin.model, skinny_linear, self._notes) if self._fuses else twin.model
            runs = fuse_pointwise(fused, notes=self._notes) if self._fuses else fused
            warn_of_lost(self._notes)
            # the compiler fuses for itself
            compiled = compile_blocks(fused, self.adapter.layers, twin.slot) if mode == "compile" else None
            self._output_layer = runs.get_output_embeddings()
            self.adapter.run_through(runs, compiled)
            # another runner may join projections meanwhile, which moves weights: recordings go on reading where these
            # lay
            self._weights = [] if mode == "eager" else [parameter.data for parameter in self.model.parameters()]
            self._seen = self._state()[0]

    @property
    def _fuses(self) -> bool:
        return self._fuse and self._mode != "eager"

    def fused(self, module: nn.Module) -> nn.Module:
        """`module`, or a twin of it that multiplies as forwards of this mode do."""
        return fuse_projections(module, skinny_linear) if self._fuses else module

    def explain(self) -> str:
        """Which products, norms, rotations and gates of each kind of layer are fused in this mode, what is not, and
        why. Where nothing is (on a CPU, in mode "eager"), what would be in mode "graph" on a GPU."""
        head, notes = f"{type(self.model).__name__} on {self.device}, mode {self._mode!r}", self._notes
        if not self._fuses:
            why = "fuse=False" if self._mode != "eager" else "this mode launches operation by operation"
            head, notes = f"{head}: nothing is fused ({why}). With mode='graph' on a GPU:", []
            rehearsal = fuse_projections(make_twin(self.model).model, skinny_linear, notes, move=False)
            fuse_pointwise(rehearsal, "reference", notes)
        return f"{head}\n{table(notes)}"

    @property
    def output_layer(self) -> nn.Module:
        """What makes logits of hidden states, as forwards of this mode do."""
        return self._output_layer

    @property
    def auto(self) -> bool:
        """Whether a recording that fails may be done without."""
        return self._auto

    def _state(self) -> tuple[tuple, bool]:
        """What recordings and twins of the model depend on: where its tensors lie, its modules and their settings,
        hooks, replaced forwards, the adapters that are switched on; and whether there are hooks."""
        seen, hooked = [], False
        for module in self.model.modules():
            own = vars(module)
            seen.append(id(module))
            seen += [x.data_ptr() for kind in ("_parameters", "_buffers") for x in own[kind].values() if x is not None]
            hooks = (*own["_forward_hooks"], *own["_forward_pre_hooks"])
            hooked = hooked or bool(hooks)
            if hooks or "forward" in own or "_active_adapter" in own:
                adapters = (repr(own.get(name)) for name in ("_active_adapter", "_disable_adapters", "merged_adapters"))
                seen.append((id(module), hooks, id(own.get("forward")), *adapters))
            if isinstance(own.get("config"), PreTrainedConfig):  # a twin has a copy
                seen.append(tuple(value for value in own.values() if type(value) in (int, float, bool, str)))
        settings = [
            {name: value for name, value in vars(config).items() if name != ATTENTION_SETTING}
            for config in configs_of(self.model)
        ]
        return (*seen, settings), hooked

    def refresh(self) -> None:
        """Begin a call: a model that has changed since it was last looked at (weights elsewhere, modules, hooks,
        adapters) is taken up as it is now.

        With "auto", a model with hooks runs eagerly: a replay calls none of them.
        """
        may_record = self._auto and self.device.type == "cuda"
        state, hooked = self._state()
        mode = self._mode if not may_record else "eager" if hooked else "graph"
        if mode != self._mode or state != self._seen:
            self._switch(mode)

    def forget(self) -> None:
        """Drop all recordings of this model, whoever made them: they hold the cache, and read weights, where these
        lay.
        """
        self._graphs.shelf.clear()
        for other in self.readers:
            other.forget()

    def report_fault(self, error: CannotCapture) -> None:
        """Something cannot be recorded: "auto" does without and warns, a mode that was asked for by name raises
        `error`.
        """
        if not self._auto:
            raise error
        warnings.warn(f'mode="auto" does without: {error}', stacklevel=2)

    def match_mode(self, target: "ModelRunner") -> None:
        """Run as `target` does: what a draft model's runner is told at every call."""
        mine, theirs = ((runner._mode, runner._fuse, runner._auto) for runner in (self, target))
        if mine != theirs or self._state()[0] != self._seen:
            self._fuse, self._auto = target._fuse, target._auto
            self._switch(target.mode)

    def share_cache(self, target: "ModelRunner") -> None:
        """Run over `target`'s cache."""
        if self.cache is not target.cache:
            self.forget()
            self.cache = target.cache

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make sure that sequences of these many tokens fit beside each other. Replaces the cache only when no sequence
        is alive.
        """
        pages = sum(-(-length // self.page_size) for length in lengths)
        free = self.cache.free_pages if self.cache else 0
        if self.cache and (pages <= free or self.cache.sequences):
            return  # what does not fit now raises OutOfPages where it is appended
        if self.cache is not None and self._fixed_pages is not None:
            return
        self.cache = None  # give the old memory back before taking the new
        self.forget()
        if (
            self._mode != "eager"
        ):  # a little more than was asked for, since whatever was recorded is lost with the cache
            pages = round_up(pages, MIN_PAGES)
        pages = max(pages, 1) if self._fixed_pages is None else self._fixed_pages
        options = dict(dtype=self.dtype, device=self.device, kv_dtype=self.kv_dtype)
        self.cache = PagedKVCache.for_layout(self.adapter.layout, pages, self.page_size, **options)

    def forward(self, sequences: Sequence[int], tokens: Tensor, counts: Sequence[int],
                tree: TokenTree | TreeBatch | tuple[Tensor, Tensor] | None = None, keep: Tensor | None = None,
                hidden: bool = False) -> RunnerOutput:  # fmt: skip
        """Append `counts[i]` new tokens to each sequence and run them: `tokens [sum(counts)]`, packed in order.

        With `tree`, the last tokens of every sequence are that tree's nodes, of which the first may be in the cache
        already; trees made on the device are a `TreeBatch` or a pair of depths `[B, N]` and ancestor bits `[B, N, W]`.
        `keep [M]` are the packed indices whose logits are wanted (None: all). Raises ValueError for a tree of more than
        MAX_TREE nodes and `attention.OutOfPages`, both before anything is appended."""
        tree = self._settled(tree)
        self.cache.append(sequences, counts)
        if self._mode != "eager" and self._graphs.worth(sum(counts), sum(counts) if keep is None else len(keep)):
            try:
                out = None
                if keep is None and len(set(counts)) == 1:
                    out = self._graphs.run(sequences, tokens, counts[0], tree, hidden)
                elif keep is not None and not isinstance(tree, tuple) and self._graphs.records_prompts:
                    out = self._graphs.run_prompts(sequences, tokens, counts, tree, keep, hidden)
                if out is not None:
                    return out
            except CannotCapture as error:
                self.report_fault(error)
        trees = [(tree.depths, tree.bits)] * len(counts) if isinstance(tree, TokenTree) else tree
        return self.forward_batch(tokens, build_batch(self.cache, sequences, counts, trees), keep, hidden)

    def forward_rows(
        self,
        rows: DeviceSequences,
        tokens: Tensor,
        tree: TokenTree | TreeBatch | tuple[Tensor, Tensor] | None = None,
        last_only: bool = False,
        hidden: bool = False,
        compiled: bool = True,
    ) -> RunnerOutput:
        """Append `tokens [B, n]` to sequences that the device keeps count of -> logits `[B, n, V]`, or with `last_only`
        `[B, 1, V]`.

        `tree` is that of `forward`; hidden states come as `[B, n, hidden]`. Nothing here asks the device. In mode
        "compile" it runs the compiled model unless `compiled` is False."""
        count, width = tokens.shape
        tree = self._settled(tree)
        batch = rows.append(width, keep_alive(node_tables(tree, self.device)) if isinstance(tree, TokenTree) else tree)
        keep = torch.arange(1, count + 1, device=self.device) * width - 1 if last_only else None
        out = self.forward_batch(tokens.flatten(), batch, keep, hidden, compiled and self.mode == "compile")
        return out.each(lambda x: x.unflatten(0, (count, -1)))

    def forward_batch(
        self, tokens: Tensor, batch: AttentionBatch, keep: Tensor | None, hidden: bool, compiled: bool = False
    ) -> RunnerOutput:
        """Run packed `tokens [T]`, which `batch` describes -> logits `[M, V]` at the packed indices `keep [M]` (None:
        all).
        """
        positions = batch.positions
        if self.max_positions is not None and batch.max_kv_length > self.max_positions:
            positions = positions.clamp(
                max=self.max_positions - 1
            )  # nodes behind the last position are never kept, but have to pass through a table
        if hidden:
            return RunnerOutput(*self.adapter.forward_with_hidden(tokens, positions, batch, keep, compiled))
        return RunnerOutput(self.adapter.forward(tokens, positions, batch, keep, compiled))

    def _settled(self, tree) -> TokenTree | tuple[Tensor, Tensor] | None:
        """Static trees as they are, chains as None, trees of the device as (depths, bits); ValueError for one that is
        too large.
        """
        if tree is None or isinstance(tree, TokenTree) and tree.is_chain:
            return None
        size = tree[0].shape[1] if isinstance(tree, tuple) else tree.size
        if size > self.MAX_TREE:
            raise ValueError(f"a tree may have {self.MAX_TREE} nodes, got {size}")
        return (tree.tables.depth, tree.tables.bits()) if isinstance(tree, TreeBatch) else tree

    @cached_property
    def graph_pool(self):
        """The memory that all CUDA graphs of this runner share; None on a CPU."""
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @property
    def recorded(self) -> int:
        """How many forwards have been recorded so far."""
        return self._graphs.shelf.count

    def extend(self, sequences: Sequence[int], tokens: Sequence[Tensor]) -> Tensor:
        """Append each sequence's own `tokens [n]`, n >= 1, in chunks, and return the logits `[B, V]` after its last
        one.
        """
        counts = [len(t) for t in tokens]
        if self._mode != "eager" and max(counts) <= SHORT_PROMPT and len(set(counts)) == 1:
            out = self.forward(sequences, torch.cat(list(tokens)), counts).logits
            return out[counts[0] - 1 :: counts[0]]
        logits: list[Tensor | None] = [None] * len(sequences)
        for start in range(0, max(len(t) for t in tokens), self.PREFILL_CHUNK):
            rows = [i for i, t in enumerate(tokens) if len(t) > start]
            at_once = max(1, self.PREFILL_TOKENS // min(self.PREFILL_CHUNK, max(len(tokens[i]) - start for i in rows)))
            for first in range(0, len(rows), at_once):
                self._extend(sequences, tokens, start, rows[first : first + at_once], logits)
        return torch.stack(logits)

    def _extend(
        self,
        sequences: Sequence[int],
        tokens: Sequence[Tensor],
        start: int,
        rows: Sequence[int],
        logits: list[Tensor | None],
    ) -> None:
        """The chunk from `start` on of some `rows`; the `logits` of those that end with it."""
        pieces = [tokens[i][start : start + self.PREFILL_CHUNK] for i in rows]
        counts = [len(p) for p in pieces]
        ends = [n - 1 for n in accumulate(counts)]
        done = [k for k, i in enumerate(rows) if len(tokens[i]) <= start + self.PREFILL_CHUNK]
        keep = torch.tensor([ends[k] for k in done], dtype=torch.int64).to(self.device, non_blocking=True)
        packed = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        out = self.forward([sequences[i] for i in rows], packed, counts, keep=keep).logits
        for k, row in zip(done, out, strict=True):
            logits[rows[k]] = row
