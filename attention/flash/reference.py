"""Flash attention in plain PyTorch: the specification of the kernels, and the implementation on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _pad(packed: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`[T, ...]` -> `[B, longest, ...]`, zero after each sequence's end, without synchronising with the device."""
    offsets = torch.arange(longest, device=packed.device)
    index = torch.where(offsets < cu_seqlens.diff()[:, None], cu_seqlens[:-1, None] + offsets, packed.shape[0])
    return F.pad(packed, (0, 0, 0, 0, 0, 1))[index]


def _unpad(padded: Tensor, cu_seqlens: Tensor, tokens: int, empty: float) -> Tensor:
    """The inverse of `_pad`; tokens after the last sequence are `empty`."""
    token = torch.arange(tokens, device=padded.device)
    row = torch.searchsorted(cu_seqlens[1:], token, right=True)  # B for those after the last sequence
    column = token - cu_seqlens[row]
    spare = padded.new_full((1, *padded.shape[1:]), empty)
    return torch.cat([padded, spare])[row, column.clamp(max=padded.shape[1] - 1)]


def flash_attention_reference(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None,
                              cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, causal: bool,
                              scale: float, window: int | None,
                              softcap: float | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(out, lse)` in the shapes of `flash_attention`, differentiable, computed in float32 (float64 for float64)."""
    tokens, q, k, v = query.shape[0], query, key, value
    lengths_q, lengths_k = (query.new_tensor([n], dtype=torch.int64) for n in (max_seqlen_q, max_seqlen_k))
    cu_q = cu_seqlens_q
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
        lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
        q, k, v = _pad(q, cu_q, max_seqlen_q), _pad(k, cu_k, max_seqlen_k), _pad(v, cu_k, max_seqlen_k)
    if q.dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bsht", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    # [B or 1, S, 1]
    position = torch.arange(max_seqlen_q, device=q.device)[:, None] + (lengths_k - lengths_q)[:, None, None]
    keys = torch.arange(max_seqlen_k, device=q.device)
    seen = keys < lengths_k[:, None, None]
    if causal:
        seen = seen & (keys <= position)
    if window is not None:
        seen = seen & (position - keys < window)
    seen = seen.expand(-1, max_seqlen_q, -1)[:, :, None]  # [B or 1, S, 1, S_k]
    some = seen.any(-1, keepdim=True)
    # a query that sees no key keeps finite scores, so that its gradients are 0, not NaN
    scores = scores.masked_fill(~seen & some, float("-inf"))
    out = torch.einsum("bsht,bthd->bshd", scores.softmax(-1).masked_fill(~some, 0.0), v)
    lse = scores.logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))
    if cu_q is not None:
        out, lse = _unpad(out, cu_q, tokens, 0.0), _unpad(lse, cu_q, tokens, float("-inf"))
    return out.to(query.dtype), lse
