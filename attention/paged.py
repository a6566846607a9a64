"""The one door to paged attention: picks an implementation, never silently."""

from torch import Tensor

from attention.batch import AttentionBatch
from attention.reference import paged_attention_reference

IMPLEMENTATIONS = {"reference": paged_attention_reference}


def paged_attention(query: Tensor, layer: int, batch: AttentionBatch, scale: float, window: int | None = None, softcap: float | None = None,
                    sinks: Tensor | None = None, impl: str | None = None) -> Tensor:  # fmt: skip
    """Attention of packed queries over the pages of one layer.

    `query [T, H, D]`, H a multiple of the cache's kv heads G; `layer` indexes `batch.cache`; `scale` multiplies the scores; `window` is a
    sliding window in tokens, `softcap` Gemma's soft-cap, `sinks [H]` GPT-OSS's attention sinks. Returns `[T, H, Dv]`.
    `impl=None` takes the best available implementation; a named one that cannot run raises ValueError.
    """
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not available here; available: {sorted(IMPLEMENTATIONS)}")
    tokens, heads, dim = query.shape
    groups, cached_dim = batch.cache.key_pages.shape[3:]
    if tokens != batch.positions.shape[0] or heads % groups or dim != cached_dim:
        raise ValueError(f"query {list(query.shape)} does not fit {batch.positions.shape[0]} tokens, {groups} kv heads and head dim {cached_dim}")
    if (window is not None and window < 1) or (sinks is not None and sinks.shape != (heads,)):
        raise ValueError(f"window must be at least 1 and sinks [{heads}], got window {window} and sinks {None if sinks is None else list(sinks.shape)}")
    return IMPLEMENTATIONS[impl or "reference"](query, layer, batch, scale, window, softcap, sinks)
