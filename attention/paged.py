"""The one door to paged attention: picks an implementation, never silently."""

import torch
from torch import Tensor

from attention.batch import AttentionBatch
from attention.impl import resolve
from attention.reference import paged_attention_reference

torch.library.define(
    "specdec::paged_attention",
    "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor? key_scales, Tensor? value_scales, Tensor block_tables, Tensor kv_lengths, "
    "Tensor cu_seqlens_q, Tensor positions, Tensor? tree_bits, Tensor? tree_sizes, Tensor? sinks, SymInt max_query_length, float scale, "
    "SymInt? window, float? softcap, bool return_lse) -> (Tensor, Tensor)",
)


@torch.library.impl("specdec::paged_attention", "CompositeExplicitAutograd")
def _paged_attention(*args):
    from attention.paged_kernel import paged_attention_triton

    return paged_attention_triton(*args)


@torch.library.register_fake("specdec::paged_attention")
def _paged_attention_fake(query, key_pages, value_pages, *rest):
    tokens, heads, _ = query.shape
    lse = query.new_empty(tokens if rest[-1] else 0, heads, dtype=torch.float32)
    return query.new_empty(tokens, heads, value_pages.shape[-1]), lse


def _paged_attention_triton(query, layer, batch, scale, window, softcap, sinks, return_lse):
    cache = batch.cache
    scales = (None, None) if cache.key_scales is None else (cache.key_scales[layer], cache.value_scales[layer])
    out, lse = torch.ops.specdec.paged_attention(
        query, cache.key_pages[layer], cache.value_pages[layer], *scales, batch.block_tables, batch.kv_lengths, batch.cu_seqlens_q, batch.positions,
        batch.tree_bits, batch.tree_sizes, sinks, batch.max_query_length, scale, window, softcap, return_lse)  # fmt: skip
    return (out, lse) if return_lse else out


IMPLEMENTATIONS = {"triton": _paged_attention_triton, "reference": paged_attention_reference}


def paged_attention(query: Tensor, layer: int, batch: AttentionBatch, scale: float, window: int | None = None, softcap: float | None = None,
                    sinks: Tensor | None = None, return_lse: bool = False, impl: str | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of packed queries over the pages of one layer.

    `query [T, H, D]`, H a multiple of the cache's kv heads G; `layer` indexes `batch.cache`; `scale` > 0 multiplies the scores; `window` is a
    sliding window in tokens, `softcap` Gemma's soft-cap, `sinks [H]` GPT-OSS's attention sinks. Returns `[T, H, Dv]`, with `return_lse` also
    the natural logarithm of each softmax's denominator (a sink's term included) as `[T, H]` float32.
    `impl=None` takes "triton" for a cache on a GPU and "reference" elsewhere; a named one that cannot run raises ValueError.
    """
    cache = batch.cache
    tokens, heads, dim = query.shape
    groups, cached_dim = cache.key_pages.shape[3:]
    if tokens != batch.positions.shape[0] or heads % groups or dim != cached_dim:
        raise ValueError(f"query {list(query.shape)} does not fit {batch.positions.shape[0]} tokens, {groups} kv heads and head dim {cached_dim}")
    if query.dtype != cache.dtype:
        raise ValueError(f"query of {query.dtype} does not fit a cache for {cache.dtype}")
    if scale <= 0 or (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale and softcap must be positive and window at least 1, got scale {scale}, softcap {softcap}, window {window}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], got {list(sinks.shape)}")
    return IMPLEMENTATIONS[resolve(impl, query.device)](query, layer, batch, scale, window, softcap, sinks, return_lse)
