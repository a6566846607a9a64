"""Runs an unchanged transformers model over the paged cache, through transformers' own AttentionInterface.

Nothing here knows a model family. A one-token probe forward shows whether, and with which shapes, a model calls the interface, and a few
tokens over pages are compared with the model by itself; a model that fails gets an error that names it. The model keeps its own
attention setting between our forwards.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from attention.batch import AttentionBatch, build_batch
from attention.cache import PagedKVCache
from attention.impl import on
from attention.kv_write import store
from attention.paged import attend

INTERFACE_NAME = "specdec_paged"  # has no mask function on purpose: the model then builds no mask, ours comes from the batch
PROBE_NAME = "specdec_probe"


class UnsupportedArchitecture(ValueError):
    """The model cannot run over a paged cache; the message names the architecture and says why."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model stores per token: seen by the probe."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int


class _Probe:
    """Stands in for a batch in the probe forward and writes down what the model says to its attention calls and to its mask."""

    def __init__(self):
        self.shapes: dict[int, tuple[int, int, int]] = {}  # layer: (G, D, Dv)
        self.windows: set[int | None] = set()  # sliding windows that attention calls name
        self.mask_windows: set[int] = set()  # windows or chunks that masks are cut to

    def mask(self, *_, local_size=None, use_vmap=False, **__):
        """Called by transformers in place of building a mask."""
        if use_vmap:
            raise UnsupportedArchitecture("its mask is more than causal (a bidirectional prefix or an overlay)")
        if local_size:  # 0 means no window
            self.mask_windows.add(local_size)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, paged=None, sliding_window=None, softcap=None, s_aux=None,
            **kwargs):  # fmt: skip
    """The function transformers calls in place of attention: `query [1, H, T, D]`, `key [1, G, T, D]`; returns `[1, T, H, Dv]`.

    `kwargs` holds what models pass to every implementation and attention has no use for (position ids, rotary tables …).
    """
    name = type(module).__name__
    if paged is None:
        raise UnsupportedArchitecture(f"{name} did not hand the batch on to its attention call, so it cannot run over a paged cache")
    if attention_mask is not None:
        raise UnsupportedArchitecture(f"{name} builds an attention mask of its own, which a paged cache cannot honour")
    if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise UnsupportedArchitecture(f"{name} uses a position bias or attends in both directions; only causal attention can be paged")
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    if isinstance(paged, _Probe):
        layer = module.layer_idx
        if layer in paged.shapes:
            raise UnsupportedArchitecture(f"{name} attends twice in layer {layer}; a paged cache holds one set of keys a layer")
        paged.shapes[layer] = (keys.shape[1], keys.shape[2], values.shape[2])
        paged.windows.add(sliding_window)
        return queries.new_zeros(1, queries.shape[0], queries.shape[1], values.shape[2]), None
    if query.dtype != paged.cache.dtype:
        raise ValueError(f"{name} computes in {query.dtype} (autocast?), but its cache was made for {paged.cache.dtype}")
    layer = module.layer_idx if paged.cache.num_layers > 1 else 0  # a compiled block sees no layer but its own
    store(paged.cache, layer, keys, values, paged.slots, padding=paged.padding)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(queries, layer, paged, scale, sliding_window, softcap, s_aux)
    if paged.tail:  # what got no output is zero, lest a model that looks at all tokens together (for the scale of 8-bit activations) meets anything
        out = out.masked_fill(paged.derived("unstored", lambda batch: (batch.slots < 0)[:, None, None]), 0.0)
    return out.unsqueeze(0), None


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

    Forwards go through `runs`, the model or a twin of it with the same weights (`attention.hf_fusion`); those with `compiled` through `compiled`, a
    twin whose blocks are compiled (`attention.hf_blocks`), which the owner sets.
    """

    def __init__(self, model):
        AttentionInterface.register(INTERFACE_NAME, _attend)
        self.model = model
        configs = [m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)]
        configs += [model.config.get_text_config()]
        self._configs = list({id(c): c for c in configs}.values())
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._tap = _Tap()
        self.runs, self.compiled = model, None
        self.shape, self.vocab_size, self.max_positions = self._probe()
        self._compare()

    def _probe(self) -> tuple[CacheShape, int, int | None]:
        """Shapes, vocabulary size, and the positions up to which the model runs over pages exactly (None: no limit known)."""
        if getattr(self.model, "_is_stateful", False):
            raise UnsupportedArchitecture(f"{type(self.model).__name__} keeps recurrent state beside keys and values, which cannot be rolled back")
        architecture, probe, config = type(self.model).__name__, _Probe(), self.model.config.get_text_config()
        why = (
            "does not call transformers' AttentionInterface in every layer, so its attention cannot be replaced "
            "(architectures that do: Llama, Qwen3, Mistral, Mixtral, Gemma2, Gemma3, Phi3, GPT-NeoX, GPT-2, OPT, GPT-OSS and most newer ones)"
        )
        AttentionInterface.register(PROBE_NAME, _attend)
        AttentionMaskInterface.register(PROBE_NAME, probe.mask)
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        try:
            logits = self._call(zero, zero, probe, None, PROBE_NAME)
        except UnsupportedArchitecture as error:
            raise UnsupportedArchitecture(f"{architecture}: {error}") from error
        except Exception as error:
            raise UnsupportedArchitecture(f"{architecture} {why}; its probe forward raised {type(error).__name__}: {error}") from error
        if sorted(probe.shapes) != list(range(config.num_hidden_layers)):
            raise UnsupportedArchitecture(f"{architecture} {why}: {len(probe.shapes)} of its {config.num_hidden_layers} layers did")
        shapes = set(probe.shapes.values())
        if len(shapes) != 1:
            raise UnsupportedArchitecture(f"{architecture} mixes layers of different (kv heads, head dim, value dim): {sorted(shapes)}")
        # a window or chunk that only the mask knows is invisible until a text outgrows it
        limits = [getattr(config, "max_position_embeddings", None), *(probe.mask_windows - probe.windows), _rope_limit(config)]
        return CacheShape(config.num_hidden_layers, *shapes.pop()), logits.shape[-1], min((n for n in limits if n is not None), default=None)

    def _compare(self) -> None:
        """Run a few tokens in two pieces over pages and at once through the untouched model: state that we do not carry would show here."""
        model, shape = self.model, self.shape
        length = min(6, self.max_positions or 6, self.vocab_size)
        tokens = torch.arange(length, device=model.device)
        dtype = next(model.parameters()).dtype
        cache = PagedKVCache(shape.num_layers, 2, 4, shape.num_kv_heads, shape.head_dim, shape.value_head_dim, dtype=dtype, device=model.device)
        sequence, pieces = cache.add(), []
        for piece in tokens.split((length + 1) // 2):
            cache.append([sequence], [len(piece)])
            batch = build_batch(cache, [sequence], [len(piece)])
            pieces.append(self.forward(piece, batch.positions, batch, None))
        with torch.inference_mode():
            expected = model(input_ids=tokens[None], position_ids=tokens[None], use_cache=False, return_dict=True).logits[0].float()
        error, scale = float((torch.cat(pieces).float() - expected).abs().max()), float(expected.abs().max())
        # rounding stays far below; NaN weights give NaN here and are reported where they produce a token
        if error > (0.02 if dtype in (torch.float32, torch.float64) else 0.2) * scale:
            raise UnsupportedArchitecture(
                f"{type(model).__name__} gives other logits over a paged cache than by itself (difference {error:.2g}, largest logit {scale:.2g}): "
                "it keeps state beside keys and values, or masks in a way of its own"
            )

    @contextmanager
    def _interface(self, name: str):
        before = [(c._attn_implementation_internal, c.pad_token_id) for c in self._configs]
        for config in self._configs:
            # packed tokens hold no padding; some models look for it all the same, which waits for the device
            config._attn_implementation_internal, config.pad_token_id = name, None
        try:
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation_internal, config.pad_token_id = own

    @torch.inference_mode()
    def _call(self, tokens: Tensor, positions: Tensor, paged, keep: Tensor | None, interface: str = INTERFACE_NAME, tapped: bool = False,
              compiled: bool = False):  # fmt: skip
        """Logits `[M, V]`, and with `tapped` also what the output embedding read."""
        inputs = dict(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True, paged=paged)
        if keep is not None and self._keeps_logits:
            inputs["logits_to_keep"] = keep
        model = self.compiled if compiled else self.runs
        with on(tokens.device), self._interface(interface):
            self._tap.seen.clear()
            logits = model(**inputs).logits[0]
            return (logits, self._tap.seen[0]) if tapped else logits

    def forward(self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None, compiled: bool = False) -> Tensor:
        """Packed `tokens [T]` at `position_ids [T]` -> logits `[M, V]` at the packed indices `keep [M]` (None: all T)."""
        logits = self._call(tokens[None], position_ids[None], batch, keep, compiled=compiled)
        return logits if keep is None or self._keeps_logits else logits[keep]

    def forward_with_hidden(self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None,
                            compiled: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `forward`, and what the output embedding read: hidden states `[M, hidden]` at the same indices."""
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._tap)
        try:
            logits, hidden = self._call(tokens[None], position_ids[None], batch, keep, tapped=True, compiled=compiled)
        finally:
            hook.remove()
            self._tap.seen.clear()
        hidden = hidden.flatten(0, -2)
        return (logits, hidden) if keep is None or self._keeps_logits else (logits[keep], hidden[keep])


class _Tap:
    """Remembers what a module is given."""

    def __init__(self):
        self.seen: list[Tensor] = []

    def __call__(self, _, inputs):
        self.seen.append(inputs[0])
