"""Runs an unchanged transformers model over the paged cache, through transformers' own AttentionInterface.

Nothing here knows a model family. A one-token probe forward shows whether, and with which shapes, a model calls the interface; a model
that does not gets an error that names it. The model keeps its own attention setting between our forwards.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from attention.batch import AttentionBatch
from attention.paged import paged_attention

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
        if local_size is not None:
            self.mask_windows.add(local_size)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, paged=None, sliding_window=None, softcap=None, s_aux=None,
            **kwargs):  # fmt: skip
    """The function transformers calls in place of attention: `query [1, H, T, D]`, `key [1, G, T, D]`; returns `[1, T, H, Dv]`.

    `kwargs` holds what models pass to every implementation and attention has no use for (position ids, rotary tables …).
    """
    name = type(module).__name__
    if paged is None:
        raise UnsupportedArchitecture(f"{name} did not hand the batch on to its attention call, so it cannot run over a paged cache")
    if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise UnsupportedArchitecture(f"{name} uses a position bias or attends in both directions; only causal attention can be paged")
    layer = module.layer_idx
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    if isinstance(paged, _Probe):
        paged.shapes[layer] = (keys.shape[1], keys.shape[2], values.shape[2])
        paged.windows.add(sliding_window)
        return queries.new_zeros(1, queries.shape[0], queries.shape[1], values.shape[2]), None
    cache = paged.cache
    cache.key_slots[layer].index_copy_(0, paged.slots, keys)
    cache.value_slots[layer].index_copy_(0, paged.slots, values)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return paged_attention(queries, layer, paged, scale, sliding_window, softcap, s_aux).unsqueeze(0), None


def _rope_limit(config) -> int | None:
    """Where rotary tables that depend on the longest text of a batch ("dynamic", "longrope") change: below it, rows are independent."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            return original or config.max_position_embeddings
    return None


class ModelAdapter:
    """A causal language model made callable on packed sequences. Raises UnsupportedArchitecture for a model that cannot be."""

    def __init__(self, model):
        AttentionInterface.register(INTERFACE_NAME, _attend)
        self.model = model
        configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
        configs += [model.config.get_text_config()]
        self._configs = list({id(c): c for c in configs}.values())
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.shape, self.vocab_size, self.max_positions = self._probe()

    def _probe(self) -> tuple[CacheShape, int, int | None]:
        """Shapes, vocabulary size, and the positions up to which the model runs over pages exactly (None: no limit known)."""
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

    @contextmanager
    def _interface(self, name: str):
        before = [c._attn_implementation_internal for c in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = name
        try:
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = own

    @torch.inference_mode()
    def _call(self, tokens: Tensor, positions: Tensor, paged, keep: Tensor | None, interface: str = INTERFACE_NAME) -> Tensor:
        extra = {} if keep is None or not self._keeps_logits else {"logits_to_keep": keep}
        with self._interface(interface):
            logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True, paged=paged, **extra).logits[0]
        return logits if keep is None or self._keeps_logits else logits[keep]

    def forward(self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None) -> Tensor:
        """Packed `tokens [T]` at `position_ids [T]` -> logits `[M, V]` at the packed indices `keep [M]` (None: all T)."""
        return self._call(tokens[None], position_ids[None], batch, keep)

    def forward_with_hidden(self, tokens: Tensor, position_ids: Tensor, batch: AttentionBatch, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `forward`, and what the output embedding read: hidden states `[M, hidden]` at the same indices."""
        seen = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.forward(tokens, position_ids, batch, keep)
        finally:
            hook.remove()
        hidden = seen[0].flatten(0, -2)
        return logits, hidden if keep is None or self._keeps_logits else hidden[keep]
