"""The door to flash attention over dense or packed batches, forward and backward: checks, the choice of implementation,
the reference.

For the query at position p of a sequence and the keys j that it sees (j <= p if causal, p - j < window with a sliding
window):

    s_j = scale * <q, k_j>,  with a soft-cap s_j = cap * tanh(s_j / cap);   out = sum_j softmax(s)_j v_j;   lse = log
    sum_j exp(s_j)

Queries are right-aligned: query i of S sits at position i + S_k - S. A query that sees no key gets out = 0 and lse =
-inf."""

import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.dispatch import triton_available

IMPLEMENTATIONS = ("fa3", "cudnn", "triton", "reference")  # fastest first


class _Options(NamedTuple):
    """What a call asks for beside its tensors; dense batches have no cu_seqlens."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float
    window: int | None
    softcap: float | None


def _options(query, key, value, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=True,
             scale=None, window=None, softcap=None) -> _Options:  # fmt: skip
    """Check a call's arguments and fill in what follows from them. Raises ValueError naming the offending value."""
    varlen = cu_seqlens_q is not None
    if varlen:
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        if max_seqlen_q is None or max_seqlen_k is None:
            raise ValueError(
                f"packed sequences need max_seqlen_q and max_seqlen_k on the host, got {max_seqlen_q} and "
                f"{max_seqlen_k}"
            )
        for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if (
                cu_seqlens.dtype not in (torch.int32, torch.int64)
                or cu_seqlens.ndim != 1
                or cu_seqlens.shape != cu_seqlens_q.shape
            ):
                raise ValueError(
                    f"{name} must be int32 or int64 [B + 1], as cu_seqlens_q, got {cu_seqlens.dtype} "
                    f"{list(cu_seqlens.shape)}"
                )
    elif cu_seqlens_k is not None or max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("cu_seqlens_k, max_seqlen_q and max_seqlen_k describe packed sequences and need cu_seqlens_q")
    shapes, dims = [list(x.shape) for x in (query, key, value)], 3 if varlen else 4
    if query.ndim != dims or key.ndim != dims or shapes[1] != shapes[2]:
        raise ValueError(
            f"{'packed' if varlen else 'dense'} query, key and value have {dims} dimensions and key's shape "
            f"is value's, got {shapes}"
        )
    if (
        shapes[0][-1] != shapes[1][-1]
        or not shapes[1][-2]
        or shapes[0][-2] % shapes[1][-2]
        or (not varlen and shapes[0][0] != shapes[1][0])
    ):
        raise ValueError(
            "key must have the query's batch size and head dim and a number of heads that divides the "
            f"query's, got {shapes}"
        )
    if (
        not query.dtype == key.dtype == value.dtype
        or not query.is_floating_point()
        or not query.device == key.device == value.device
    ):
        raise ValueError(
            "query, key and value must share a floating dtype and a device, got "
            f"{[(x.dtype, x.device) for x in (query, key, value)]}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf or (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        raise ValueError(
            f"scale and softcap must be positive and window at least 1, got scale {scale}, softcap {softcap}, "
            f"window {window}"
        )
    longest_q, longest_k = (max_seqlen_q, max_seqlen_k) if varlen else (query.shape[1], key.shape[1])
    if window is not None and window >= longest_k:  # the last query, at position S_k - 1, sees back to key 0
        window = None
    return _Options(
        cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, causal, scale, window,
        None if softcap is None else float(softcap),
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _fa3_provider() -> str | None:
    """Where FlashAttention-3 comes from: its own package, or vLLM's build of it if the user has loaded that library."""
    if importlib.util.find_spec("flash_attn_interface"):
        return "package"
    return "vllm" if hasattr(torch.ops._vllm_fa3_C, "fwd") else None


def _obstacle(name: str, query: Tensor, key: Tensor, value: Tensor, options: _Options, return_lse: bool) -> str | None:
    """What keeps implementation `name` from doing a call, or None if it can."""
    dim, gradients = query.shape[-1], torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if name == "reference":
        return None
    if name == "triton":
        if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or dim > 256:
            return f"it takes float32, float16 and bfloat16 with head dims up to 256, got {query.dtype} with {dim}"
        return (
            None
            if triton_available(query.device)
            else f"it needs the package triton and a GPU or TRITON_INTERPRET=1, got device {query.device}"
        )
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or dim > 256 or dim % 8:
        return (
            "it takes float16 and bfloat16 on a GPU with head dims up to 256 in steps of 8, got "
            f"{query.dtype} on {query.device} with {dim}"
        )
    if options.window is not None or options.softcap is not None or return_lse or not query.numel() or not key.numel():
        return (
            "it takes no window, no softcap, no return_lse and no empty tensors, got window "
            f"{options.window}, softcap {options.softcap}"
        )
    if name == "fa3":
        provider = _fa3_provider()
        if provider is None or torch.cuda.get_device_capability(query.device)[0] != 9:
            return (
                "it needs a Hopper GPU and the package flash_attn_interface, or vLLM's library loaded as "
                "torch.ops._vllm_fa3_C"
            )
        return "vLLM's build has no backward" if gradients and provider == "vllm" else None
    if options.cu_seqlens_q is not None or query.shape[1] != key.shape[1]:
        return f"it takes dense batches with as many keys as queries, got {list(query.shape)} and {list(key.shape)}"
    if gradients and torch.are_deterministic_algorithms_enabled():
        return "its gradients are not deterministic, and torch.use_deterministic_algorithms is on"
    if torch.compiler.is_compiling():
        return "torch's own check of what it takes cannot be traced by torch.compile"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, options.causal, q.shape[1] != k.shape[1])
    return (
        None
        if torch.backends.cuda.can_use_cudnn_attention(parameters)
        else "torch's cuDNN backend does not take these tensors"
    )


def _choose(query: Tensor, key: Tensor, value: Tensor, options: _Options, return_lse: bool, impl: str | None) -> str:
    if impl is None:
        usable = IMPLEMENTATIONS if query.device.type == "cuda" else ("reference",)
        return next(name for name in usable if _obstacle(name, query, key, value, options, return_lse) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of {list(IMPLEMENTATIONS)}")
    fallback_reason = _obstacle(impl, query, key, value, options, return_lse)
    if fallback_reason is not None:
        raise ValueError(f"impl={impl!r} cannot do this call: {fallback_reason}")
    return impl


def flash_implementation(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool = False, impl: str | None = None, **options
) -> str:
    """The implementation that `flash_attention` runs for the same arguments: "fa3", "cudnn", "triton" or
    "reference".
    """
    return _choose(query, key, value, _options(query, key, value, **options), return_lse, impl)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens_q: Tensor | None = None,
                    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
                    max_seqlen_k: int | None = None, causal: bool = True, scale: float | None = None,
                    window: int | None = None, softcap: float | None = None, return_lse: bool = False,
                    impl: str | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Exact attention over a dense or a packed batch, differentiable.

    Dense: `query [B, S, H, D]`, `key`, `value [B, S_k, G, D]`, H a multiple of G, -> `[B, S, H, D]`. Packed: `[T, H,
    D]` and `[T_k, G, D]`
    with `cu_seqlens_q`, `cu_seqlens_k [B + 1]` (int32 or int64; keys as queries by default) and the longest lengths as
    host integers,
    -> `[T, H, D]`, zero behind the last sequence. `scale` defaults to D ** -0.5, `window` is a sliding window in
     tokens, `softcap` Gemma's.
    With `return_lse` also the natural log-sum-exp, fp32 (fp64 for fp64 inputs), `[B, S, H]` or `[T, H]`; it is
    differentiable too.

    `impl=None` takes the fastest implementation that can do the call (`flash_implementation` says which); a named one
    that cannot raises ValueError. Gradients of "triton" are bitwise repeatable, in every mode; those of "fa3" and
    "cudnn" need not be, and under `torch.use_deterministic_algorithms(True)` they are made so or not used. Inside
    torch.compile "cudnn" is not available.

    >>> query, key = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
    >>> flash_attention(query, key, key).shape
    torch.Size([1, 5, 4, 16])
    """
    options = _options(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap
    )
    name = _choose(query, key, value, options, return_lse, impl)
    if name == "fa3":
        return _fa3(query, key, value, options)
    if name == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=options.causal, scale=options.scale, enable_gqa=grouped
            ).transpose(1, 2)
    if name == "reference":
        out, lse = flash_attention_reference(query, key, value, *options)
    else:
        out, lse = torch.ops.specdec.flash_forward(query, key, value, *options)
        lse = lse.unflatten(1, query.shape[:-2]).movedim(0, -1)
    return (out, lse) if return_lse else out


def _fa3(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    """FlashAttention-3, whichever way it is installed."""
    cu_q, cu_k = (None if x is None else x.to(torch.int32) for x in options[:2])
    if _fa3_provider() == "vllm":  # built for packed sequences only
        flat = [x if options.cu_seqlens_q is not None else x.flatten(0, 1) for x in (query, key, value)]
        if cu_q is None:
            cu_q, cu_k = (
                torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], dtype=torch.int32, device=x.device)
                for x in (query, key)
            )
        scheduling = (True, None, 0, None, 0, None, 1, 0, None)
        return torch.ops._vllm_fa3_C.fwd(
            *flat, *(None,) * 4, cu_q, cu_k, *(None,) * 3, options.max_seqlen_q, options.max_seqlen_k, *(None,) * 9,
            options.scale, options.causal, -1, -1, 0.0, *scheduling)[0].view(query.shape)  # fmt: skip
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    common = dict(
        softmax_scale=options.scale, causal=options.causal, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    if cu_q is None:
        out = flash_attn_func(query, key, value, **common)
    else:
        out = flash_attn_varlen_func(
            query, key, value, cu_q, cu_k, options.max_seqlen_q, options.max_seqlen_k, **common
        )
    return out[0] if isinstance(out, tuple) else out


def _pad(packed: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """`[T, ...]` -> `[B, longest, ...]`, zero behind each sequence's end, without reading device data on the host."""
    offsets = torch.arange(longest, device=packed.device)
    index = torch.where(offsets < cu_seqlens.diff()[:, None], cu_seqlens[:-1, None] + offsets, packed.shape[0])
    return F.pad(packed, (0, 0, 0, 0, 0, 1))[index]


def _unpad(padded: Tensor, cu_seqlens: Tensor, tokens: int, empty: float) -> Tensor:
    """The inverse of `_pad`; tokens behind the last sequence are `empty`."""
    token = torch.arange(tokens, device=padded.device)
    row = torch.searchsorted(cu_seqlens[1:], token, right=True)  # B for those behind the last sequence
    column = token - cu_seqlens[row]
    spare = padded.new_full((1, *padded.shape[1:]), empty)
    return torch.cat([padded, spare])[row, column.clamp(max=padded.shape[1] - 1)]


def flash_attention_reference(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None,
                              cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, causal: bool,
                              scale: float, window: int | None,
                              softcap: float | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The specification in plain PyTorch, differentiable: `(out, lse)` in `flash_attention`'s shapes. Arithmetic is
    float32 (float64 for float64).
    """
    tokens = query.shape[0]
    lengths_q, lengths_k = (
        query.new_tensor([max_seqlen_q], dtype=torch.int64),
        query.new_tensor([max_seqlen_k], dtype=torch.int64),
    )
    q, k, v = query, key, value
    if cu_seqlens_q is not None:
        cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
        lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
        q, k, v = _pad(q, cu_q, max_seqlen_q), _pad(k, cu_k, max_seqlen_k), _pad(v, cu_k, max_seqlen_k)
    if q.dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bsht", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    position = (
        torch.arange(max_seqlen_q, device=q.device)[:, None] + (lengths_k - lengths_q)[:, None, None]
    )  # [B or 1, S, 1]
    keys = torch.arange(max_seqlen_k, device=q.device)
    seen = keys < lengths_k[:, None, None]
    if causal:
        seen = seen & (keys <= position)
    if window is not None:
        seen = seen & (position - keys < window)
    seen = seen.expand(-1, max_seqlen_q, -1)[:, :, None]  # [B or 1, S, 1, S_k]
    some = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(
        ~seen & some, float("-inf")
    )  # a query that sees nothing keeps finite scores, so that gradients are 0, not NaN
    out = torch.einsum("bsht,bthd->bshd", scores.softmax(-1).masked_fill(~some, 0.0), v)
    lse = scores.logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))
    if cu_seqlens_q is not None:
        out, lse = _unpad(out, cu_q, tokens, 0.0), _unpad(lse, cu_q, tokens, float("-inf"))
    return out.to(query.dtype), lse


_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool "
    "causal, float scale, int? window, float? softcap"
)
torch.library.define(
    "specdec::flash_forward", f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)"
)
torch.library.define(
    "specdec::flash_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("specdec::flash_forward", "CompositeExplicitAutograd")
def _forward_op(query, key, value, *options):
    """`(out like query, lse [H, rows])`; the Triton kernels."""
    from attention.flash.forward_kernel import flash_forward

    options = _Options(*options)
    return flash_forward(
        query, key, value, options.cu_seqlens_q, options.cu_seqlens_k, options.max_seqlen_q, *options[4:]
    )


@torch.library.register_fake("specdec::flash_forward")
def _(query, key, value, *options):
    return query.new_empty(query.shape), query.new_empty(query.shape[-2], query.shape[:-2].numel(), dtype=torch.float32)


@torch.library.impl("specdec::flash_backward", "CompositeExplicitAutograd")
def _backward_op(*arguments):
    """Gradients of query, key and value."""
    from attention.flash.backward_kernel import flash_backward

    return flash_backward(*arguments)


@torch.library.register_fake("specdec::flash_backward")
def _(grad_out, grad_lse, query, key, value, *rest):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output):
    query, key, value, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, grad_lse):
    query, key, value, out, lse, *cu_seqlens = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out  # only the log-sum-exp was used
    grads = torch.ops.specdec.flash_backward(grad_out, grad_lse, query, key, value, out, lse, *cu_seqlens, *ctx.options)
    return *grads, *[None] * 8


torch.library.register_autograd("specdec::flash_forward", _gradients, setup_context=_save)
