"""Paged attention in plain PyTorch: the specification of the kernels, and the implementation on a CPU.

For one query token at position p and head h of kv group g, over the keys j that it may see:

    s_j = scale * <q, k_j>            then  s_j = cap * tanh(s_j / cap)  with a soft-cap
    out = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink_h))            the sink term only where the model has sinks

It sees itself and all tokens before it (causal), of its tree only its ancestors, and with a sliding window only keys
with p - position(j) < window, or position(j) < first (`KeyWindow.sinks` of the cache). Arithmetic is float32 (float64
for float64 inputs)."""

from types import SimpleNamespace
from typing import cast

import torch
from einops import repeat
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.kv.cache import PagedKVCache
from attention.kv.quantization import dequantise
from attention.paged.batch import AttentionBatch


def _query_index(batch: AttentionBatch) -> Tensor:
    """[B, Q]: index of query i of sequence b among the T packed tokens, right-aligned; short rows repeat a token."""
    ends = batch.cu_seqlens_q[1:, None]
    offsets = torch.arange(-batch.max_query_length, 0, device=ends.device)
    return torch.maximum(ends + offsets, batch.cu_seqlens_q[:-1, None])


def _key_slots(batch: AttentionBatch) -> slice | Tensor:
    """[B * L]: the slot of every key; a slice for one sequence with consecutive pages, whose keys are read in place.

    Positions after a sequence's end repeat its first key, so unused pages are never read."""
    if batch.run is not None:
        return batch.run
    size = batch.cache.page_size
    offsets = torch.arange(size, device=batch.block_tables.device)
    slots = (batch.block_tables[:, :, None] * size + offsets).flatten(1)[:, : batch.max_kv_length]
    if not batch.uniform:
        inside = torch.arange(slots.shape[1], device=slots.device) < batch.kv_lengths[:, None]
        slots = torch.where(inside, slots, slots[:, :1])
    return slots.flatten()


def _gather(rows: Tensor, slots: slice | Tensor, sequences: int) -> Tensor:
    """`rows [num_slots, G, ...]` of one layer at the slots of B sequences -> `[B, G, L, ...]`."""
    if isinstance(slots, slice):
        return rows[slots].transpose(0, 1)[None]
    return rows.index_select(0, slots).unflatten(0, (sequences, -1)).transpose(1, 2)


def _real_queries(batch: AttentionBatch) -> Tensor:
    """[T]: index of each packed token among the B * Q right-aligned queries; tokens after the end repeat a query."""
    ends = batch.cu_seqlens_q[1:]
    token = torch.arange(batch.positions.shape[0], device=ends.device)
    row = torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)
    return (token + (row + 1) * batch.max_query_length - ends[row]).clamp(max=len(ends) * batch.max_query_length - 1)


def visible_keys(batch: AttentionBatch, window: int | None, repeats: int) -> Tensor | None:
    """[B, 1, R * Q, L] bool: which keys each query sees, once for each of the R heads of a kv group; None: all keys."""
    unwindowed = window is None or window >= batch.max_kv_length
    if batch.uniform and batch.max_query_length == 1 and batch.tree_bits is None and unwindowed:
        return None
    index = batch.derived("query_index", _query_index)
    keys = torch.arange(batch.max_kv_length, device=index.device)
    query_position = batch.positions[index]  # [B, Q]
    index_of_query = index + (batch.kv_lengths - batch.cu_seqlens_q[1:])[:, None]  # [B, Q], in its own sequence
    visible = keys <= index_of_query[:, :, None]
    key_position = keys.expand(batch.num_sequences, -1)
    if batch.tree_bits is not None:
        assert batch.cu_tree_sizes is not None and batch.tree_positions is not None
        sizes = batch.cu_tree_sizes.diff()
        node = keys - (batch.kv_lengths - sizes)[:, None]  # [B, L], negative in the prefix
        in_tree = (node >= 0) & (node < sizes[:, None])
        node = node.clamp(0, 64 * batch.tree_bits.shape[1] - 1)
        words = batch.tree_bits[index].gather(2, (node // 64)[:, None].expand(-1, index.shape[1], -1))  # [B, Q, L]
        ancestor = (words >> (node % 64)[:, None]) & 1 == 1
        query_in_tree = index_of_query >= (batch.kv_lengths - sizes)[:, None]
        visible = torch.where(in_tree[:, None] & query_in_tree[:, :, None], ancestor, visible)
        packed = batch.cu_tree_sizes[1:, None] - batch.kv_lengths[:, None] + keys
        packed = packed.clamp(0, batch.tree_positions.shape[0] - 1)
        key_position = torch.where(in_tree, batch.tree_positions[packed], key_position)
    if window is not None:
        near = query_position[:, :, None] - key_position[:, None] < window
        visible = visible & (near if batch.cache.sinks == 0 else near | (key_position < batch.cache.sinks)[:, None])
    return visible.repeat(1, repeats, 1)[:, None]


def _unpack(x: Tensor, batch: AttentionBatch, heads: int, packed: bool) -> Tensor:
    """[B, G, R * Q, X] -> [T, H, X]; `packed` when all of the B * Q rows are real queries."""
    sequences, length = batch.num_sequences, batch.max_query_length
    x = x.reshape(sequences, heads, length, -1).transpose(1, 2).reshape(sequences * length, heads, -1).contiguous()
    return x if packed else x[batch.derived("real_queries", _real_queries)]


def paged_attention_reference(query: Tensor, layer: int, batch: AttentionBatch, scale: float, window: int | None = None,
                              softcap: float | None = None, sinks: Tensor | None = None,
                              return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention.paged_attention` without its checks: `[T, H, Dv]`, with `return_lse` also `[T, H]`."""
    cache, sequences, length = batch.cache, batch.num_sequences, batch.max_query_length
    slots = batch.derived("key_slots", _key_slots)
    if isinstance(slots, slice):
        k, v = cache.key_heads[layer][:, :, slots], cache.value_heads[layer][:, :, slots]
    else:  # [B * L, G, D] -> [B, G, L, D]
        k, values = _gather(cache.key_slots[layer], slots, sequences), cache.value_slots[layer]
        v = k[..., : values.shape[-1]] if cache.values_in_keys else _gather(values, slots, sequences)
    if cache.kv_dtype is not None:
        scales = (_gather(x[layer], slots, sequences) for x in (cache.key_scale_slots, cache.value_scale_slots))
        wide = torch.promote_types(query.dtype, torch.float32)
        k, v = (dequantise(q, scale).to(wide) for q, scale in zip((k, v), scales, strict=True))
    heads, groups = query.shape[1], k.shape[1]
    packed = query.shape[0] == sequences * length and not batch.tail
    q = query if packed else query[batch.derived("query_index", _query_index).flatten()]
    if query.dtype not in (torch.float32, torch.float64):
        q, k, v = q.float(), k.float(), v.float()
    # the R = H / G query heads of a kv group become rows [B, G, R * Q, D], so that a group's keys are read once
    if sequences == 1:
        q = q.transpose(0, 1).reshape(1, groups, -1, q.shape[2])
    else:
        q = q.view(sequences, length, groups, heads // groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    visible = batch.derived(("visible", window, heads // groups), lambda b: visible_keys(b, window, heads // groups))
    if softcap is None and sinks is None and not return_lse:
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        return _unpack(out, batch, heads, packed).to(query.dtype)
    scores = torch.matmul(q * scale, k.transpose(2, 3))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # a sink takes its share of the mass and has no value
        sink = repeat(sinks.to(scores.dtype), "(g r) -> b g (r q) 1", b=sequences, g=groups, q=length)
        scores = torch.cat([scores, sink], -1)
    out = torch.matmul(scores.softmax(-1)[..., : k.shape[2]], v)
    out = _unpack(out, batch, heads, packed).to(query.dtype)
    if not return_lse:
        return out
    return out, _unpack(scores.logsumexp(-1, keepdim=True), batch, heads, packed)[..., 0].float()


def reference_over_tensors(query: Tensor, key_pages: Tensor, value_pages: Tensor, key_scales: Tensor | None,
                           value_scales: Tensor | None, block_tables: Tensor, kv_lengths: Tensor, cu_seqlens_q: Tensor,
                           positions: Tensor, tree_bits: Tensor | None, cu_tree_sizes: Tensor | None,
                           tree_positions: Tensor | None, sinks: Tensor | None, max_query_length: int, scale: float,
                           window: int | None, first_tokens: int, softcap: float | None,
                           return_lse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op `specdec::paged_attention` by the reference, from the pages `[num_pages, P, G, ...]` of one layer."""
    kinds = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
    pages = dict(key=key_pages, value=value_pages, key_scale=key_scales, value_scale=value_scales)
    slots = {f"{name}_slots": [x.flatten(0, 1)] for name, x in pages.items() if x is not None}
    # the part of a cache that the reference reads
    sizes = dict(page_size=key_pages.shape[1], sinks=first_tokens, values_in_keys=False)
    layer = SimpleNamespace(kv_dtype=kinds.get(key_pages.dtype), **sizes, **slots)
    batch = AttentionBatch(
        cast(PagedKVCache, layer), block_tables, kv_lengths, cu_seqlens_q, positions, positions.new_empty(0),
        max_query_length, int(kv_lengths.max()), False,
        tree_bits=tree_bits, cu_tree_sizes=cu_tree_sizes, tree_positions=tree_positions,
    )  # fmt: skip
    found = paged_attention_reference(query, 0, batch, scale, window, softcap, sinks, return_lse)
    return found if isinstance(found, tuple) else (found, query.new_empty(0, query.shape[1], dtype=torch.float32))
