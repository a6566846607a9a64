"""Flash attention as an attention implementation of transformers, for training and inference with its own caches.

transformers calls two functions: one per forward for a mask, one per layer for attention. The mask function here
returns None if the batch is dense and causal, else a `BatchLayout`: which tokens are real, and where sequences begin.
It derives that from the 2-D padding mask and from transformers' mask function, evaluated for neighbouring tokens only:
a token that cannot see its predecessor begins a sequence (packed `position_ids`) or a chunk. All layers of a type share
the layout, so a forward synchronises once per type of layer.

The output for padding tokens is zero, where eager attention returns an average of all values. A loss must not include
them; with padding on the left that includes the prediction of the first real token."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.flash.api import flash_attention


class BatchLayout(NamedTuple):
    """Which of the B * S query and B * S_k key slots are real tokens, and where sequences begin among them.

    A named tuple, since accelerate moves those between devices."""

    window: int | None
    queries: Tensor | None = None  # [T]; None: the batch is dense and only the window matters
    keys: Tensor | None = None  # [T_k]
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


def batch_layout(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None,
                 attention_mask=None, local_size=None, allow_is_causal_skip=True, use_vmap=False,
                 device=None, **kwargs) -> BatchLayout | None:  # fmt: skip
    """The mask function that transformers calls; keywords in `kwargs` matter only to masks that are tensors.

    `attention_mask [B, cached + new]` is the padding mask. Raises ValueError for masks that are not causal inside each
    sequence, for static caches, and for a sliding window over padding between real tokens."""
    if use_vmap or "allow_is_bidirectional_skip" in kwargs:
        raise ValueError(
            "flash attention takes causal masks with padding, packing and windows only; this model or call "
            "adds a mask of its own"
        )
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            "the last query must see the last key; transformers' static caches are not supported, leave "
            "cache_implementation at its default"
        )
    windowed = local_size is not None and kv_length > local_size
    if attention_mask is None and allow_is_causal_skip and not windowed:
        return None

    positions = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    rows, zero = torch.arange(batch_size, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    sees = lambda query, key: mask_function(rows, zero, query[None], key[None]).expand(batch_size, -1)
    begins = F.pad(~sees(positions[1:], positions[:-1]), (1, 0), value=True)  # [B, S_k]
    ahead = sees(positions[:-1], positions[1:])
    real = torch.ones_like(begins)
    if attention_mask is not None:
        real = attention_mask.to(device, torch.bool)[:, kv_offset : kv_offset + kv_length]

    sequence = begins.flatten().cumsum(0) - 1  # [B * S_k]
    # real tokens after padding or at the beginning of a sequence
    rises = real & (begins | ~F.pad(real, (1, 0))[:, :-1])
    real_queries = real[:, -q_length:]
    count, any_ahead, all_real = torch.stack([begins.sum(), ahead.any().long(), real.all().long()]).tolist()
    if any_ahead:
        raise ValueError("flash attention takes causal masks only; this mask lets a token see a later one")
    if all_real and count == batch_size:
        return BatchLayout(local_size) if windowed else None
    keys_per_sequence = torch.bincount(sequence[real.flatten()], minlength=count)
    queries_per_sequence = torch.bincount(sequence.view(batch_size, -1)[:, -q_length:][real_queries], minlength=count)
    pieces = torch.zeros_like(keys_per_sequence).index_add_(0, sequence, rises.flatten().long())
    largest = queries_per_sequence.max(), keys_per_sequence.max(), pieces.max()
    longest_q, longest_k, most_pieces = torch.stack(largest).tolist()
    if windowed and most_pieces > 1:
        raise ValueError(
            f"a sliding window of {local_size} tokens over padding between real tokens is not supported; pad "
            "on one side only"
        )
    return BatchLayout(
        local_size if windowed else None,
        queries=real_queries.flatten().nonzero().squeeze(1),
        keys=real.flatten().nonzero().squeeze(1),
        cu_seqlens_q=F.pad(queries_per_sequence.cumsum(0), (1, 0)).int(),
        cu_seqlens_k=F.pad(keys_per_sequence.cumsum(0), (1, 0)).int(),
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
    )


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
            softcap=None, s_aux=None, is_causal=None, cu_seq_lens_q=None, cu_seq_lens_k=None,
            max_length_q=None, max_length_k=None, impl=None, **kwargs):  # fmt: skip
    """The attention function that transformers calls.

    `query [B, H, S, D]`, `key [B, G, S_k, D]`, `value [B, G, S_k, D]` -> `([B, S, H, D], None)`. `kwargs` holds what
    models pass to every implementation and flash attention does not need (position ids, rotary tables …)."""
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"{name}: flash attention has no dropout, got {dropout}; set the configuration's attention "
            "dropout to 0 or train with eager"
        )
    if s_aux is not None or kwargs.get("position_bias") is not None:
        raise ValueError(f"{name}: flash attention has no attention sinks and no position bias; use eager")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{name} attends in both directions; this attention implementation is for causal models")
    if kwargs.get("output_attentions") or kwargs.get("cache") is not None:
        raise ValueError(
            f"{name}: flash attention returns no attention weights and takes no paged cache of transformers"
        )
    if attention_mask is not None and not isinstance(attention_mask, BatchLayout):
        raise ValueError(
            f"{name} got a mask tensor {list(attention_mask.shape)}; flash attention takes padding masks "
            "[batch, tokens] and packed position_ids"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = sliding_window if attention_mask is None else attention_mask.window
    attend = partial(flash_attention, scale=scaling, softcap=softcap, window=window, impl=impl)
    if attention_mask is None and cu_seq_lens_q is not None:  # a data collator packed the sequences
        lengths = dict(
            cu_seqlens_q=cu_seq_lens_q, cu_seqlens_k=cu_seq_lens_k, max_seqlen_q=max_length_q, max_seqlen_k=max_length_k
        )
        out = attend(*(x.flatten(0, 1) for x in (q, k, v)), **lengths)
        assert isinstance(out, Tensor)  # without return_lse
        return out.unflatten(0, q.shape[:2]), None
    if attention_mask is None or attention_mask.queries is None:
        return attend(q, k, v), None
    lengths = {name: getattr(attention_mask, name) for name in BatchLayout._fields[3:]}
    places = attention_mask.queries, attention_mask.keys, attention_mask.keys
    packed = [x.flatten(0, 1).index_select(0, place) for x, place in zip((q, k, v), places, strict=True)]
    out = attend(*packed, **lengths)
    assert isinstance(out, Tensor)
    padded = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:]).index_copy(0, attention_mask.queries, out)
    return padded.unflatten(0, q.shape[:2]), None


def register_flash_attention(name: str = "specdec_dense", impl: str | None = None) -> str:
    """Make `model.set_attn_implementation(name)` run `flash_attention` with `impl`; returns `name`.

    For training and inference with causal models. Raises ValueError for a name that contains "flash": transformers
    takes such names for kernels to download."""
    if "flash" in name:
        raise ValueError(
            f'{name!r} contains "flash", which transformers takes for one of its own downloadable kernels; '
            "choose another name"
        )
    from transformers import AttentionInterface, AttentionMaskInterface  # takes seconds

    AttentionInterface.register(name, partial(_attend, impl=impl))
    AttentionMaskInterface.register(name, batch_layout)
    return name
