"""Paged attention in plain PyTorch: the specification of every kernel, and the implementation on a CPU.

For one query token at position p and head h of kv group g, over the keys j that it may see:

    s_j = scale * <q, k_j>            then  s_j = cap * tanh(s_j / cap)  with a soft-cap
    out = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink_h))            the sink term only where the model has sinks

It sees key j when j lies in the prefix or is the token itself or an earlier one (causal); inside a tree tail only its ancestors; and,
with a sliding window, only while p - position(j) < window. Arithmetic is float32 (float64 for float64 inputs).
"""

import torch
from einops import rearrange
from torch import Tensor

from attention.batch import AttentionBatch


def _query_index(batch: AttentionBatch) -> Tensor:
    """[B, Q]: where query i of sequence b lies among the T packed tokens, right-aligned; rows shorter than Q repeat a token."""
    ends = batch.cu_seqlens_q[1:, None]
    offsets = torch.arange(-batch.max_query_length, 0, device=ends.device)
    return torch.maximum(ends + offsets, batch.cu_seqlens_q[:-1, None])


def _key_slots(batch: AttentionBatch) -> Tensor:
    """[B * L]: the slot of every key position; positions behind a sequence's end repeat its first key, and unused pages are never read."""
    size = batch.cache.page_size
    offsets = torch.arange(size, device=batch.block_tables.device)
    slots = (batch.block_tables[:, :, None] * size + offsets).flatten(1)[:, : batch.max_kv_length]
    if not batch.uniform:
        inside = torch.arange(slots.shape[1], device=slots.device) < batch.kv_lengths[:, None]
        slots = torch.where(inside, slots, slots[:, :1])
    return slots.flatten()


def _visible(batch: AttentionBatch, window: int | None) -> Tensor | None:
    """[B, 1, Q, 1, L] bool: which keys each query sees. None when it is all of them."""
    if batch.uniform and batch.max_query_length == 1 and (window is None or window >= batch.max_kv_length):
        return None
    index = batch.derived("query_index", _query_index)
    keys = torch.arange(batch.max_kv_length, device=index.device)
    query_position = batch.positions[index]  # [B, Q]
    index_of_query = index + (batch.kv_lengths - batch.cu_seqlens_q[1:])[:, None]  # [B, Q], in its own sequence
    visible = keys <= index_of_query[:, :, None]
    key_position = keys.expand(batch.num_sequences, -1)
    if batch.tree_bits is not None:
        node = keys - (batch.kv_lengths - batch.tree_sizes)[:, None]  # [B, L], negative in the prefix
        in_tree = (node >= 0) & (node < batch.tree_sizes[:, None])
        node = node.clamp(0, 64 * batch.tree_bits.shape[1] - 1)
        words = batch.tree_bits[index].gather(2, (node // 64)[:, None].expand(-1, index.shape[1], -1))  # [B, Q, L]
        ancestor = (words >> (node % 64)[:, None]) & 1 == 1
        query_in_tree = index_of_query >= (batch.kv_lengths - batch.tree_sizes)[:, None]
        visible = torch.where(in_tree[:, None] & query_in_tree[:, :, None], ancestor, visible)
        # the tree's tokens are the last queries: read their positions off the packed ones
        token = (batch.cu_seqlens_q[1:, None] - batch.kv_lengths[:, None] + keys).clamp(0, batch.positions.shape[0] - 1)
        key_position = torch.where(in_tree, batch.positions[token], key_position)
    if window is not None:
        visible = visible & (query_position[:, :, None] - key_position[:, None] < window)
    return visible[:, None, :, None]


def paged_attention_reference(query: Tensor, layer: int, batch: AttentionBatch, scale: float, window: int | None = None,
                              softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """`query [T, H, D]`, keys and values of `layer` in `batch.cache` -> `[T, H, Dv]`. See the module's docstring for the maths."""
    cache, sequences = batch.cache, batch.num_sequences
    slots = batch.derived("key_slots", _key_slots)
    keys, values = cache.key_slots[layer], cache.value_slots[layer]
    groups = keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    packed = query.shape[0] == sequences * batch.max_query_length
    padded = query if packed else query[batch.derived("query_index", _query_index).flatten()]
    # the query heads of a kv group become rows, so that a group's keys are read once
    q = rearrange(padded, "(b q) (g r) d -> b g (q r) d", b=sequences, g=groups).to(dtype)
    k = rearrange(keys.index_select(0, slots), "(b l) g d -> b g d l", b=sequences).to(dtype)
    v = rearrange(values.index_select(0, slots), "(b l) g d -> b g l d", b=sequences).to(dtype)
    scores = rearrange(torch.matmul(q * scale, k), "b g (q r) l -> b g q r l", q=batch.max_query_length)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = batch.derived(("visible", window), lambda b: _visible(b, window))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:  # the sink takes its share of the mass and carries no value
        sink = rearrange(sinks.to(dtype), "(g r) -> 1 g 1 r 1", g=groups).expand(sequences, -1, scores.shape[2], -1, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    out = rearrange(torch.matmul(weights.flatten(2, 3), v), "b g (q r) d -> (b q) (g r) d", q=batch.max_query_length)
    if not packed:  # right-aligned rows: take the real queries back
        starts = (torch.arange(1, sequences + 1, device=out.device) * batch.max_query_length - batch.cu_seqlens_q[1:])[:, None]
        real = torch.arange(query.shape[0], device=out.device)
        row = torch.searchsorted(batch.cu_seqlens_q[1:], real, right=True)
        out = out[real + starts[row, 0]]
    return out.to(query.dtype)
