"""Runs an unchanged transformers model over the paged cache, through transformers' own AttentionInterface.

Nothing here knows a model family. A one-token probe forward shows whether, and with which shapes, a model calls the interface; a model
that does not gets an error that names it. The model keeps its own attention setting between our forwards.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from attention.batch import AttentionBatch
from attention.paged import paged_attention

INTERFACE_NAME = "specdec_paged"


class UnsupportedArchitecture(ValueError):
    """The model cannot run over a paged cache; the message names the architecture and says why."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model stores per token: seen by the probe."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int


class _Probe(dict):
    """Stands in for a batch in the probe forward: collects `{layer: (G, D, Dv)}`."""


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
    queries, keys, values = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    if isinstance(paged, _Probe):
        paged[layer] = (keys.shape[1], keys.shape[2], values.shape[2])
        return queries.new_zeros(1, queries.shape[0], queries.shape[1], values.shape[2]), None
    cache = paged.cache
    cache.key_slots[layer].index_copy_(0, paged.slots, keys)
    cache.value_slots[layer].index_copy_(0, paged.slots, values)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return paged_attention(queries, layer, paged, scale, sliding_window, softcap, s_aux).unsqueeze(0), None


class ModelAdapter:
    """A causal language model made callable on packed sequences. Raises UnsupportedArchitecture for a model that cannot be."""

    def __init__(self, model):
        # no mask function is registered on purpose: the model then builds no mask, and ours comes from the batch
        AttentionInterface.register(INTERFACE_NAME, _attend)
        self.model = model
        configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
        configs += [model.config.get_text_config()]
        self._configs = list({id(c): c for c in configs}.values())
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.shape, self.vocab_size = self._probe()

    def _probe(self) -> tuple[CacheShape, int]:
        architecture, seen = type(self.model).__name__, _Probe()
        why = (
            "does not call transformers' AttentionInterface in every layer, so its attention cannot be replaced "
            "(architectures that do: Llama, Qwen3, Mistral, Mixtral, Gemma2, Gemma3, Phi3, GPT-NeoX, GPT-2, OPT, GPT-OSS and most newer ones)"
        )
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        try:
            logits = self._call(zero, zero, seen, None)
        except UnsupportedArchitecture as error:
            raise UnsupportedArchitecture(f"{architecture}: {error}") from error
        except Exception as error:
            raise UnsupportedArchitecture(f"{architecture} {why}; its probe forward raised {type(error).__name__}: {error}") from error
        layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(seen) != list(range(layers)):
            raise UnsupportedArchitecture(f"{architecture} {why}: {len(seen)} of its {layers} layers did")
        if len(set(seen.values())) != 1:
            raise UnsupportedArchitecture(f"{architecture} mixes layers of different (kv heads, head dim, value dim): {sorted(set(seen.values()))}")
        return CacheShape(layers, *seen[0]), logits.shape[-1]

    @contextmanager
    def _interface(self):
        before = [c._attn_implementation_internal for c in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = INTERFACE_NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name

    @torch.inference_mode()
    def _call(self, tokens: Tensor, positions: Tensor, paged, keep: Tensor | None) -> Tensor:
        extra = {} if keep is None or not self._keeps_logits else {"logits_to_keep": keep}
        with self._interface():
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
