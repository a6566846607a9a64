"""The function that a twin calls in place of its attention: it stores keys and values in pages and attends to them."""

import torch

from attention.hf.latent import LATENT, LatentHeads
from attention.hf.probe import Probe, UnsupportedArchitecture, require_plain
from attention.hf.twin import SLOT, CallSlot
from attention.kv.places import Place
from attention.paged.batch import AttentionBatch
from attention.paged.layer import store_and_attend

# no mask function has this name, so that the model builds no mask: paged attention takes it from the batch
INTERFACE_NAME = "specdec_paged"


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
           softcap=None, s_aux=None, **kwargs):  # fmt: skip
    """The attention function that transformers calls.

    `query [1, H, T, D]`, `key [1, G, T, D]`, `value [1, G, T, Dv]` -> `([1, T, H, Dv], None)`."""
    name, slot = type(module).__name__, slot_of(module)
    if attention_mask is not None:
        raise UnsupportedArchitecture(f"{name} builds an attention mask of its own, which a paged cache cannot honour")
    if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise UnsupportedArchitecture(
            f"{name} uses a position bias or attends in both directions; only causal attention can be paged"
        )
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    latent: LatentHeads | None = vars(module).get(LATENT)
    if latent is not None:
        queries = latent.query(queries)
    if isinstance(slot.batch, Probe):
        require_plain(name, queries, keys, values, kwargs)
        out = slot.batch.attend(module, queries, keys, values, sliding_window, latent is not None)
        return (out if latent is None else latent.value(out)).unsqueeze(0), None
    paged, place = next_place(slot, slot.batch, name, query.dtype)
    out = store_and_attend(
        paged, place.layer, queries, keys, values, scale, sliding_window, softcap, s_aux, store_new=not place.shared
    )
    return (out if latent is None else latent.value(out)).unsqueeze(0), None


def slot_of(module) -> CallSlot:
    """The state of the forward that a twin's module takes part in. Raises UnsupportedArchitecture where it has none."""
    slot = vars(module).get(SLOT)
    if slot is None:
        raise UnsupportedArchitecture(
            f"{type(module).__name__} holds no configuration of its own, so it cannot be told which cache to use"
        )
    return slot


def next_place(slot: CallSlot, batch: AttentionBatch, name: str, dtype) -> tuple[AttentionBatch, Place]:
    """Where the next attention call of a forward stores keys and values of `dtype`; `name` is the module's class.

    Raises ValueError for another dtype than the cache's, and UnsupportedArchitecture for a call too many."""
    if dtype != batch.cache.dtype:
        raise ValueError(f"{name} computes in {dtype} (autocast?), but its cache was made for {batch.cache.dtype}")
    layer = 0
    if (layers := len(batch.cache.places)) > 1:  # a compiled block sees no layer but its own
        layer = slot.attended
        if layer >= layers:
            raise UnsupportedArchitecture(f"{name} attends more often than when it was probed ({layers} times)")
    if not torch.compiler.is_compiling():
        slot.attended += 1
    return batch.at(layer)
