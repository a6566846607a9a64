"""Runs an unchanged transformers model over the paged cache, through transformers' own AttentionInterface.

Nothing here knows a model family. Forwards go through a twin of the model with the same weights (`attention.hf_twin`); the model itself is never
touched, so it may run beside. A probe forward shows whether, and with which shapes, a model calls the interface, and some tokens over pages are
compared with the model by itself; a model that fails gets an error that names it.
"""

import inspect
import re
import traceback
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from attention.batch import AttentionBatch, build_batch
from attention.cache import PagedKVCache
from attention.hf_twin import SLOT, CallSlot, Twin, make_twin, tap_output_layer
from attention.impl import on
from attention.kv_write import store
from attention.paged import attend

INTERFACE_NAME = "specdec_paged"  # has no mask function on purpose: the model then builds no mask, ours comes from the batch
PROBE_NAME = "specdec_probe"
PROBE_TOKENS = 2
SHORTEST, LONGEST = 6, 520  # tokens of the comparison between pages and the model by itself
# settings that matter only from some length on: a comparison has to be longer
LENGTHS = re.compile(r"window|chunk|block|index|budget|compress|local|stride|sparse|floor_scale|original_max_position")
HARMLESS = {  # tensors that models hand to every implementation and attention over pages has no use for
    "position_ids", "position_embeddings", "cache_position", "cos", "sin", "input_ids", "inputs_embeds", "hidden_states", "cu_seq_lens_q", "cu_seq_lens_k",
}  # fmt: skip


class UnsupportedArchitecture(ValueError):
    """The model cannot run over a paged cache; the message names the architecture and says why."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model stores per token: seen by the probe. `num_layers` counts attention calls."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int


@dataclass(frozen=True, slots=True)
class Limit:
    """The positions up to which a model runs over pages exactly, and in words why no further."""

    positions: int
    why: str

    def __str__(self) -> str:
        return f"the model's {self.positions} positions{self.why}"


class _Probe:
    """Stands in for a batch in the probe forward and writes down what the model says to its attention calls and to its masks."""

    def __init__(self):
        self.shapes: list[tuple[int, int, int]] = []  # (G, D, Dv) of each attention call, in order
        self.callers: list[object] = []  # the modules that called, in order
        self.windows: set[int | None] = set()  # sliding windows that attention calls name
        self.mask_windows: set[int] = set()  # windows or chunks that masks are cut to

    def attend(self, module, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Note a call with `queries [T, H, D]`, `keys [T, G, D]`, `values [T, G, Dv]`; returns zeros `[T, H, Dv]`."""
        self.shapes.append((keys.shape[1], keys.shape[2], values.shape[2]))
        self.callers.append(module)
        self.windows.add(window)
        return queries.new_zeros(queries.shape[0], queries.shape[1], values.shape[2])


_probing: ContextVar[_Probe | None] = ContextVar("probing", default=None)


def _probe_mask(*_, local_size=None, use_vmap=False, **__) -> None:
    """Called by transformers in place of building a mask."""
    if use_vmap:
        raise UnsupportedArchitecture("its mask is more than causal (a bidirectional prefix or an overlay)")
    if local_size:  # 0 means no window
        _probing.get().mask_windows.add(local_size)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, s_aux=None, **kwargs):
    """The function transformers calls in place of attention: `query [1, H, T, D]`, `key [1, G, T, D]`; returns `[1, T, H, Dv]`."""
    name, slot = type(module).__name__, vars(module).get(SLOT)
    if slot is None:
        raise UnsupportedArchitecture(f"{name} holds no configuration of its own, so it cannot be told which cache to use")
    if attention_mask is not None:
        raise UnsupportedArchitecture(f"{name} builds an attention mask of its own, which a paged cache cannot honour")
    if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise UnsupportedArchitecture(f"{name} uses a position bias or attends in both directions; only causal attention can be paged")
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    if isinstance(slot.batch, _Probe):
        _require_plain(name, queries, keys, values, kwargs)
        return slot.batch.attend(module, queries, keys, values, sliding_window).unsqueeze(0), None
    paged = slot.batch
    if query.dtype != paged.cache.dtype:
        raise ValueError(f"{name} computes in {query.dtype} (autocast?), but its cache was made for {paged.cache.dtype}")
    layer = 0
    if paged.cache.num_layers > 1:  # a compiled block sees no layer but its own
        layer = slot.attended
        if layer >= paged.cache.num_layers:
            raise UnsupportedArchitecture(f"{name} attends more often than when it was probed ({paged.cache.num_layers} times)")
    if not torch.compiler.is_compiling():
        slot.attended += 1
    store(paged.cache, layer, keys, values, paged.slots, padding=paged.padding)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(queries, layer, paged, scale, sliding_window, softcap, s_aux)
    if paged.tail:  # what got no output is zero, lest a model that looks at all tokens together (for the scale of 8-bit activations) meets anything
        out = out.masked_fill(paged.derived("unstored", lambda batch: (batch.slots < 0)[:, None, None]), 0.0)
    return out.unsqueeze(0), None


def _require_plain(name: str, queries: Tensor, keys: Tensor, values: Tensor, kwargs: dict) -> None:
    """Raise UnsupportedArchitecture for an attention call that says more than its queries, keys and values."""
    if not len(queries) == len(keys) == len(values) == PROBE_TOKENS:
        raise UnsupportedArchitecture(
            f"{name} attends with {len(queries)} queries to {len(keys)} keys in a forward over {PROBE_TOKENS} tokens: it chooses or adds keys of its own"
        )
    unknown = [key for key, given in kwargs.items() if key not in HARMLESS and _holds_tensor(given)]
    if unknown:
        raise UnsupportedArchitecture(f"{name} hands {', '.join(unknown)} to its attention call, which attention over pages knows nothing of")


def _holds_tensor(given) -> bool:
    return isinstance(given, Tensor) or isinstance(given, list | tuple) and any(map(_holds_tensor, given))


def _rope_limit(config) -> int | None:
    """Where rotary tables that depend on the longest text of a batch ("dynamic", "longrope") change: below it, rows are independent."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            return original or config.max_position_embeddings
    return None


class ModelAdapter:
    """A causal language model made callable on packed sequences. Raises UnsupportedArchitecture for a model that cannot be.

    Forwards go through the twin, or what the owner makes of it after `renew` and gives to `run_through`: one with fused operations
    (`attention.hf_fusion`), and for forwards with `compiled` one whose blocks are compiled (`attention.hf_blocks`). One forward at a time: the twin
    knows one batch.

    `shape` is what the cache has to hold, `limit` the positions that can be honoured (None: no limit known); `layers` names the modules that attend,
    in the order of the cache's layers.
    """

    def __init__(self, model):
        AttentionInterface.register(INTERFACE_NAME, _attend)
        AttentionInterface.register(PROBE_NAME, _attend)
        AttentionMaskInterface.register(PROBE_NAME, _probe_mask)
        self.model = model
        _require_causal_lm(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.renew()
        self.run_through(self.twin.model)
        self._probe()
        self._compare()

    def renew(self) -> Twin:
        """Make the twin anew, of the model as it is now."""
        self.twin = make_twin(self.model)
        self.twin.attend_through(INTERFACE_NAME)
        return self.twin

    def run_through(self, runs, compiled=None) -> None:
        """Run forwards through these modules, made of the newest twin."""
        self._runs, self._compiled = runs, compiled
        for model in (runs, compiled):
            if model is not None:
                tap_output_layer(model, self.slot)

    @property
    def slot(self) -> CallSlot:
        """What the forward under way is told and leaves."""
        return self.twin.slot

    @property
    def max_positions(self) -> int | None:
        """The positions up to which the model runs over pages exactly."""
        return None if self.limit is None else self.limit.positions

    def _probe(self) -> None:
        """Find out shapes, vocabulary size, the order of layers and the limit."""
        architecture, probe, config = type(self.model).__name__, _Probe(), self.model.config.get_text_config()
        kinds = _layer_kinds(config)
        if getattr(self.model, "_is_stateful", False) and not (kinds and kinds <= ATTENDING | PLAIN):
            raise UnsupportedArchitecture(f"{architecture} keeps recurrent state beside keys and values, which cannot be rolled back")
        tokens = torch.arange(PROBE_TOKENS, device=self.model.device)[None]
        self.twin.attend_through(PROBE_NAME)
        token = _probing.set(probe)
        try:
            logits = self._call(self._runs, tokens, tokens, probe, None)
        except UnsupportedArchitecture as error:
            raise UnsupportedArchitecture(f"{architecture}: {error}") from error
        except Exception as error:
            if _is_ours(error):
                raise
            raise UnsupportedArchitecture(f"{architecture} {_what_is_missing(probe, error)}") from error
        finally:
            _probing.reset(token)
            self.twin.attend_through(INTERFACE_NAME)
        expected = sum(kind not in PLAIN for kind in _layer_list(config)) if kinds else config.num_hidden_layers
        if len(probe.shapes) < expected:
            raise UnsupportedArchitecture(f"{architecture} {_NO_INTERFACE}: {len(probe.shapes)} of its {expected} layers do")
        if logits.ndim != 2 or len(logits) != PROBE_TOKENS:
            raise UnsupportedArchitecture(f"{architecture} gives {list(logits.shape)} for {PROBE_TOKENS} tokens, not one row of logits for each")
        if len(set(probe.shapes)) != 1:
            raise UnsupportedArchitecture(f"{architecture} mixes layers of different (kv heads, head dim, value dim): {sorted(set(probe.shapes))}")
        names = {id(module): name for name, module in self.twin.model.named_modules()}
        self.layers = tuple(names.get(id(module), "") for module in probe.callers)
        self.shape, self.vocab_size = CacheShape(len(probe.shapes), *probe.shapes[0]), logits.shape[-1]
        self.limit = _limit(config, probe)

    def _compare(self) -> None:
        """Run some tokens in two pieces over pages and at once through the untouched model: state that we do not carry would show here.

        As many tokens as it takes for what the configuration lets matter only from some length on, up to LONGEST.
        """
        model, shape = self.model, self.shape
        length = min(_telling_length(model.config.get_text_config()), self.max_positions or LONGEST)
        tokens = torch.arange(length, device=model.device) % self.vocab_size
        positions, dtype = torch.arange(length, device=model.device)[None], next(model.parameters()).dtype
        pages = -(-length // 4)
        cache = PagedKVCache(shape.num_layers, pages, 4, shape.num_kv_heads, shape.head_dim, shape.value_head_dim, dtype=dtype, device=model.device)
        sequence, pieces = cache.add(), []
        for piece in tokens.split((length + 1) // 2):
            cache.append([sequence], [len(piece)])
            batch = build_batch(cache, [sequence], [len(piece)])
            pieces.append(self.forward(piece, batch.positions, batch, None))
        with torch.inference_mode(), on(model.device):
            expected = model(input_ids=tokens[None], position_ids=positions, use_cache=False, return_dict=True).logits[0].float()
        error, scale = float((torch.cat(pieces).float() - expected).abs().max()), float(expected.abs().max())
        # rounding stays far below; NaN weights give NaN here and are reported where they produce a token
        if error > (0.02 if dtype in (torch.float32, torch.float64) else 0.2) * scale:
            raise UnsupportedArchitecture(
                f"{type(model).__name__} gives other logits over a paged cache than by itself (difference {error:.2g}, largest logit {scale:.2g}, "
                f"{length} tokens): it keeps state beside keys and values, or masks in a way of its own"
            )

    @torch.inference_mode()
    def _call(self, model, tokens: Tensor, positions: Tensor, batch: AttentionBatch | _Probe, keep: Tensor | None) -> Tensor:
        """Logits `[M, V]` of `tokens [1, T]` at `positions [1, T]`; what the output layer read is left in the slot."""
        inputs = dict(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True)
        if keep is not None and self._keeps_logits:
            inputs["logits_to_keep"] = keep
        slot = self.slot
        slot.batch, slot.attended, slot.hidden = batch, 0, None
        try:
            with on(tokens.device):
                logits = model(**inputs).logits[0]
        finally:
            slot.batch = None
        if not isinstance(batch, _Probe) and slot.attended != self.shape.num_layers:
            raise UnsupportedArchitecture(
                f"{type(self.model).__name__} attended {slot.attended} times over the paged cache in one forward, and "
                f"{self.shape.num_layers} times when it was probed: a module of it was replaced, or its forward, by one that keeps hold of the original"
            )
        return logits

    def forward(self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None, compiled: bool = False) -> Tensor:
        """Packed `tokens [T]` at `position_ids [T]` -> logits `[M, V]` at the packed indices `keep [M]` (None: all T)."""
        try:
            logits = self._call(self._compiled if compiled else self._runs, tokens[None], position_ids[None], batch, keep)
        finally:
            self.slot.hidden = None
        return logits if keep is None or self._keeps_logits else logits[keep]

    def forward_with_hidden(self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None,
                            compiled: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `forward`, and what the output embedding read: hidden states `[M, hidden]` at the same indices."""
        try:
            logits = self._call(self._compiled if compiled else self._runs, tokens[None], position_ids[None], batch, keep)
            hidden = self.slot.hidden
        finally:
            self.slot.hidden = None
        if hidden is None:
            raise UnsupportedArchitecture(f"{type(self.model).__name__} makes logits without calling its output layer, so its hidden states are not seen")
        hidden = hidden.flatten(0, -2)
        return (logits, hidden) if keep is None or self._keeps_logits else (logits[keep], hidden[keep])


_NO_INTERFACE = (
    "does not call transformers' AttentionInterface in every layer, so its attention cannot be replaced "
    "(architectures that do: Llama, Qwen3, Mistral, Mixtral, Gemma2, Gemma3, Phi3, GPT-NeoX, GPT-2, OPT, GPT-OSS and most newer ones)"
)
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "attention"}  # kinds of layers that keep keys and values and nothing else
PLAIN = {"mlp", "moe", "dense", "sparse_mlp"}  # and kinds that keep nothing


def _require_causal_lm(model) -> None:
    """Raise UnsupportedArchitecture for a model that writes no text, or that puts something before it."""
    name = type(model).__name__
    prompt = next((c for c in getattr(model, "peft_config", None) and model.peft_config.values() or () if getattr(c, "is_prompt_learning", False)), None)
    if prompt is not None:
        raise UnsupportedArchitecture(f"{name} with {type(prompt).__name__} puts virtual tokens before every prompt, which a paged cache does not hold")
    if not getattr(model, "can_generate", lambda: True)():
        raise UnsupportedArchitecture(f"{name} is no causal language model: it cannot generate text")


def _layer_list(config) -> list[str]:
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def _layer_kinds(config) -> set[str]:
    """What kinds of layers a configuration names, if it names them one by one."""
    return set(_layer_list(config))


def _limit(config, probe: _Probe) -> Limit | None:
    """The least of: positions, a window or chunk that only the mask knows (invisible until a text outgrows it), changing rotary tables."""
    limits = [Limit(n, "") for n in [getattr(config, "max_position_embeddings", None)] if n is not None]
    limits += [Limit(n, f" before the window or chunk of {n} tokens matters, which it tells to its mask alone") for n in probe.mask_windows - probe.windows]
    if (rope := _rope_limit(config)) is not None:
        limits.append(Limit(rope, " before its rotary tables change, for all rows at once, with the longest text"))
    return min(limits, key=lambda limit: limit.positions, default=None)


def _telling_length(config) -> int:
    """Tokens that show whatever the configuration's windows, blocks and indexers do beyond some length."""
    sizes = [value for name, value in vars(config).items() if type(value) is int and LENGTHS.search(name) and not name.endswith(("_id", "_size_base"))]
    return min(LONGEST, max([SHORTEST, *(2 * size + 2 for size in sizes if 2 * size + 2 <= LONGEST)]))


def _is_ours(error: Exception) -> bool:
    """Whether an exception was raised by this library's code rather than by the model's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").split(".")[0] in ("attention", "specdec")


def _what_is_missing(probe: _Probe, error: Exception) -> str:
    """Why a model whose probe forward raised cannot be run, in words."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    while frame is not None and not any("mask" in name for name in frame.f_locals) and frame.f_code.co_name != "forward":
        frame = frame.f_back
    masks = [name for name, value in (frame.f_locals.items() if frame is not None else ()) if "mask" in name and value is None]
    where = type(frame.f_locals.get("self", error)).__name__ if frame is not None else type(error).__name__
    said = f"{type(error).__name__}: {error}"
    if masks:
        return (
            f"attends, or chooses what to attend to, by itself: {where} reads {masks[0]}, which a forward over packed tokens does not have "
            f"({said}); only attention that goes through transformers' AttentionInterface can be paged"
        )
    if not probe.shapes:
        return f"{_NO_INTERFACE}; {where} stopped before its first attention call ({said})"
    return f"cannot run over packed tokens: {where} stopped after {len(probe.shapes)} attention calls ({said})"
