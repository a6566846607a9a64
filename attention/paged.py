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
    tokens, heads = query.shape[0], query.shape[1]
    groups = batch.cache.key_pages.shape[3]
    if tokens != batch.positions.shape[0] or heads % groups:
        raise ValueError(f"query {list(query.shape)} does not fit a batch of {batch.positions.shape[0]} tokens and {groups} kv heads")
    return IMPLEMENTATIONS[impl or "reference"](query, layer, batch, scale, window, softcap, sinks)
