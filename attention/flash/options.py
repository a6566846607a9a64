"""What a call of flash attention asks for beside its tensors, checked."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class FlashOptions(NamedTuple):
    """The options of a call with all defaults filled in; dense batches have no cu_seqlens."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float
    window: int | None
    softcap: float | None


def flash_options(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> FlashOptions:
    """Check the arguments of `flash_attention` and fill in defaults. Raises ValueError naming the offending value."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None or max_seqlen_q is not None or max_seqlen_k is not None:
            raise ValueError(
                "cu_seqlens_k, max_seqlen_q and max_seqlen_k describe packed sequences and need cu_seqlens_q"
            )
    else:
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        if max_seqlen_q is None or max_seqlen_k is None:
            raise ValueError(
                f"packed sequences need max_seqlen_q and max_seqlen_k on the host, got {max_seqlen_q} and "
                f"{max_seqlen_k}"
            )
        _check_cumulative("cu_seqlens_q", cu_seqlens_q, cu_seqlens_q)
        _check_cumulative("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q)
    _check_tensors(query, key, value, packed=cu_seqlens_q is not None)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf or (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        raise ValueError(
            f"scale and softcap must be positive and window at least 1, got scale {scale}, softcap {softcap}, "
            f"window {window}"
        )
    longest_q = query.shape[1] if max_seqlen_q is None else max_seqlen_q
    longest_k = key.shape[1] if max_seqlen_k is None else max_seqlen_k
    if window is not None and window >= longest_k:  # the last query, at position S_k - 1, sees back to key 0
        window = None
    softcap = None if softcap is None else float(softcap)
    return FlashOptions(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, causal, scale, window, softcap)


def _check_cumulative(name: str, cu_seqlens: Tensor, cu_seqlens_q: Tensor) -> None:
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integers or cu_seqlens.ndim != 1 or cu_seqlens.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{name} must be int32 or int64 [B + 1], as cu_seqlens_q, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> None:
    tensors, dims = (query, key, value), 3 if packed else 4
    of_query, of_key, of_value = shapes = [list(x.shape) for x in tensors]
    if query.ndim != dims or key.ndim != dims or of_key != of_value:
        raise ValueError(
            f"{'packed' if packed else 'dense'} query, key and value have {dims} dimensions and key's shape is "
            f"value's, got {shapes}"
        )
    grouped = of_key[-2] and of_query[-2] % of_key[-2] == 0
    if of_query[-1] != of_key[-1] or not grouped or (not packed and of_query[0] != of_key[0]):
        raise ValueError(
            "key must have the query's batch size and head dim and a number of heads that divides the query's, got "
            f"{shapes}"
        )
    same = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    if not same or not query.is_floating_point():
        raise ValueError(
            "query, key and value must share a floating dtype and a device, got "
            f"{[(x.dtype, x.device) for x in tensors]}"
        )
