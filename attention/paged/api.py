"""Paged attention: checks the arguments, chooses an implementation and runs it."""

import math

import torch
from torch import Tensor

from attention.dispatch import resolve, triton_available
from attention.kv.cache import PagedKVCache
from attention.paged.batch import AttentionBatch
from attention.paged.reference import paged_attention_reference, reference_over_tensors

MAX_HEAD_DIM = 576  # of the kernel: 512 numbers of a latent and 64 rotated ones

torch.library.define("specdec::paged_attention",
                     "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor? key_scales, Tensor? value_scales, "
                     "Tensor block_tables, Tensor kv_lengths, Tensor cu_seqlens_q, Tensor positions, "
                     "Tensor? tree_bits, Tensor? cu_tree_sizes, Tensor? tree_positions, Tensor? sinks, "
                     "SymInt max_query_length, float scale, SymInt? window, SymInt first_tokens, float? softcap, "
                     "bool return_lse) "
                     "-> (Tensor, Tensor)")  # fmt: skip


@torch.library.impl("specdec::paged_attention", "CompositeExplicitAutograd")
def _paged_attention(query, *args):
    if not triton_available(query.device):
        return reference_over_tensors(query, *args)
    from attention.paged.attention_kernel import paged_attention_triton

    return paged_attention_triton(query, *args)


@torch.library.register_fake("specdec::paged_attention")
def _paged_attention_fake(query, key_pages, value_pages, *rest):
    tokens, heads, _ = query.shape
    lse = query.new_empty(tokens if rest[-1] else 0, heads, dtype=torch.float32)
    return query.new_empty(tokens, heads, value_pages.shape[-1]), lse


def _through_op(query, layer, batch, scale, window, softcap, sinks, return_lse):
    cache = batch.cache
    scales = [None if scales is None else scales[layer] for scales in (cache.key_scales, cache.value_scales)]
    out, lse = torch.ops.specdec.paged_attention(
        query, cache.key_pages[layer], cache.value_pages[layer], *scales, batch.block_tables, batch.kv_lengths,
        batch.cu_seqlens_q, batch.positions, batch.tree_bits, batch.cu_tree_sizes, batch.tree_positions, sinks,
        batch.max_query_length, scale, window, cache.sinks, softcap, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _fallback_reason(query: Tensor, cache: PagedKVCache) -> str | None:
    """Why the kernel cannot do a call, or None if it can."""
    dims, group = (query.shape[-1], cache.value_pages.shape[-1]), query.shape[1] // cache.key_pages.shape[3]
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, got {query.dtype}"
    if max(dims) > MAX_HEAD_DIM or group > 128:
        return f"it takes head dims up to {MAX_HEAD_DIM} and up to 128 query heads a kv head, got {dims} and {group}"
    if torch.is_grad_enabled() and query.requires_grad:
        return "it has no backward, and the query requires a gradient (flash_attention has one)"
    if cache.kv_dtype is not None and dims[1] % 2:
        return f"8-bit pages need an even value head dim, got {dims[1]}"
    if cache.kv_dtype == "fp8" and query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 9):
        return "fp8 pages need a GPU of compute capability 8.9 or newer"
    return None


IMPLEMENTATIONS = {"triton": _through_op, "reference": paged_attention_reference}


def paged_attention(
    query: Tensor,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed queries over the pages of one layer of `batch.cache`.

    query: `[T, H, D]`, H a multiple of the cache's kv heads
    scale: multiplies the scores, above 0
    window: a sliding window, in tokens; `batch.cache.sees` narrows it
    softcap: Gemma's cap on the scores
    sinks: `[H]`, GPT-OSS's attention sinks

    Returns `[T, H, Dv]`, with `return_lse` also the natural logarithm of each softmax's denominator (a sink's term
    included) as `[T, H]` float32. `impl=None` takes "triton" for a cache on a GPU where it can do the call and
    "reference" elsewhere; a named one that cannot raises ValueError, as do shapes and dtypes that do not fit."""
    cache = batch.cache
    if query.ndim != 3 or query.device != cache.device or not 0 <= layer < cache.num_layers:
        raise ValueError(
            f"query must be [T, H, D] on {cache.device} and layer below {cache.num_layers}, got {list(query.shape)} "
            f"on {query.device}, {layer}"
        )
    tokens, heads, dim = query.shape
    groups, cached_dim = cache.key_pages.shape[3:]
    if tokens != batch.positions.shape[0] or heads % groups or dim != cached_dim:
        raise ValueError(
            f"query {list(query.shape)} does not fit {batch.positions.shape[0]} tokens, {groups} kv heads and "
            f"head dim {cached_dim}"
        )
    if query.dtype != cache.dtype:
        raise ValueError(f"query of {query.dtype} does not fit a cache for {cache.dtype}")
    bad_window = window is not None and not (window >= 1 and window == int(window))
    if not 0 < scale < math.inf or (softcap is not None and not 0 < softcap < math.inf) or bad_window:
        raise ValueError(
            f"scale and softcap must be positive and window a whole number >= 1, got scale {scale}, softcap {softcap}, "
            f"window {window}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], got {list(sinks.shape)}")
    return attend(query, layer, batch, scale, cache.narrowed(window), softcap, sinks, return_lse, impl)


def attend(query: Tensor, layer: int, batch: AttentionBatch, scale: float, window: int | None, softcap: float | None,
           sinks: Tensor | None, return_lse: bool = False,
           impl: str | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`paged_attention` without its checks, for arguments that are known to fit: those of a model that was probed."""
    name = resolve(impl, query.device, lambda: _fallback_reason(query, batch.cache))
    # a compiled model on a CPU calls the op, which runs the reference, so that torch.compile does not trace it
    run = _through_op if torch.compiler.is_compiling() and query.device.type == "cpu" else IMPLEMENTATIONS[name]
    return run(query, layer, batch, scale, window, softcap, sinks, return_lse)
