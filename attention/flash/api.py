"""Flash attention over dense or packed batches, forward and backward: chooses an implementation and runs it.

For the query at position p of a sequence and the keys j that it sees (j <= p if causal, p - j < window with a sliding
window):

    s_j = scale * <q, k_j>            then  s_j = cap * tanh(s_j / cap)  with a soft-cap
    out = sum_j softmax(s)_j v_j      lse = log sum_j exp(s_j)

Queries are right-aligned: query i of S is at position i + S_k - S. A query that sees no key gets out = 0 and lse =
-inf."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.dispatch import triton_available
from attention.flash.options import FlashOptions, flash_options
from attention.flash.reference import flash_attention_reference

IMPLEMENTATIONS = ("fa3", "cudnn", "triton", "reference")  # fastest first


def _fa3_provider() -> str | None:
    """Where FlashAttention-3 comes from: its own package, or vLLM's build of it if the user has loaded that library."""
    if importlib.util.find_spec("flash_attn_interface"):
        return "package"
    return "vllm" if hasattr(torch.ops._vllm_fa3_C, "fwd") else None


# what torch.compiler.assume_constant_result sets, without importing torch._dynamo, which takes seconds
vars(_fa3_provider)["_dynamo_marked_constant"] = True


def _fallback_reason(
    name: str, query: Tensor, key: Tensor, value: Tensor, options: FlashOptions, return_lse: bool
) -> str | None:
    """Why implementation `name` cannot do a call, or None if it can."""
    dim, gradients = query.shape[-1], torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if name == "reference":
        return None
    if name == "triton":
        if query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or dim > 256:
            return f"it takes float32, float16 and bfloat16 with head dims up to 256, got {query.dtype} with {dim}"
        if triton_available(query.device):
            return None
        return f"it needs the package triton and a GPU or TRITON_INTERPRET=1, got device {query.device}"
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or dim > 256 or dim % 8:
        return (
            f"it takes float16 and bfloat16 on a GPU with head dims up to 256 in steps of 8, got {query.dtype} on "
            f"{query.device} with {dim}"
        )
    if options.window is not None or options.softcap is not None or return_lse or not query.numel() or not key.numel():
        return (
            f"it takes no window, no softcap, no return_lse and no empty tensors, got window {options.window}, softcap "
            f"{options.softcap}"
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
    usable = torch.backends.cuda.can_use_cudnn_attention(parameters)
    return None if usable else "torch's cuDNN backend does not take these tensors"


def _choose(
    query: Tensor, key: Tensor, value: Tensor, options: FlashOptions, return_lse: bool, impl: str | None
) -> str:
    reason = lambda name: _fallback_reason(name, query, key, value, options, return_lse)
    if impl is None:
        usable = IMPLEMENTATIONS if query.device.type == "cuda" else ("reference",)
        return next(name for name in usable if reason(name) is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of {list(IMPLEMENTATIONS)}")
    if (found := reason(impl)) is not None:
        raise ValueError(f"impl={impl!r} cannot do this call: {found}")
    return impl


def flash_implementation(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool = False, impl: str | None = None, **options
) -> str:
    """The implementation that `flash_attention` runs for these arguments: "fa3", "cudnn", "triton" or "reference"."""
    return _choose(query, key, value, flash_options(query, key, value, **options), return_lse, impl)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a dense or a packed batch, differentiable.

    query: `[B, S, H, D]` dense, `[T, H, D]` packed
    key, value: `[B, S_k, G, D]` dense, `[T_k, G, D]` packed; H is a multiple of G
    cu_seqlens_q, cu_seqlens_k: `[B + 1]` of a packed batch, int32 or int64; keys are packed as queries by default
    max_seqlen_q, max_seqlen_k: the longest sequences of a packed batch, integers on the host
    scale: `D ** -0.5` by default
    window: a sliding window, in tokens
    softcap: Gemma's cap on the scores

    Returns the query's shape, zero after the last packed sequence. With `return_lse` also the natural log-sum-exp in
    float32 (float64 for float64), `[B, S, H]` or `[T, H]`, differentiable too.

    `impl=None` takes the fastest implementation that can do the call (`flash_implementation` tells which); a named one
    that cannot raises ValueError. Gradients of "triton" are bitwise repeatable in every mode; those of "fa3" and
    "cudnn" need not be, and under `torch.use_deterministic_algorithms(True)` they are made so or not used. Inside
    torch.compile "cudnn" is not available.

    >>> query, key = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
    >>> flash_attention(query, key, key).shape
    torch.Size([1, 5, 4, 16])
    """
    options = flash_options(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap
    )
    name = _choose(query, key, value, options, return_lse, impl)
    if name == "fa3":
        return _fa3(query, key, value, options)
    if name == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            causal, grouped = options.causal, q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=options.scale, enable_gqa=grouped)
            return out.transpose(1, 2)
    if name == "reference":
        out, lse = flash_attention_reference(query, key, value, *options)
    else:
        out, lse = torch.ops.specdec.flash_forward(query, key, value, *options)
        lse = lse.unflatten(1, query.shape[:-2]).movedim(0, -1)
    return (out, lse) if return_lse else out


def _fa3(query: Tensor, key: Tensor, value: Tensor, options: FlashOptions) -> Tensor:
    """Run FlashAttention-3 from whichever package provides it."""
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

    deterministic = torch.are_deterministic_algorithms_enabled()
    common = dict(softmax_scale=options.scale, causal=options.causal, deterministic=deterministic)
    if cu_q is None:
        out = flash_attn_func(query, key, value, **common)
    else:
        longest = options.max_seqlen_q, options.max_seqlen_k
        out = flash_attn_varlen_func(query, key, value, cu_q, cu_k, *longest, **common)
    return out[0] if isinstance(out, tuple) else out


_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, "
    "int? window, float? softcap"
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
def _forward_op(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    """`(out like query, lse [H, rows])` by the Triton kernels."""
    from attention.flash.forward_kernel import flash_forward

    return flash_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, *options)


@torch.library.register_fake("specdec::flash_forward")
def _(query, key, value, *options):
    return query.new_empty(query.shape), query.new_empty(query.shape[-2], query.shape[:-2].numel(), dtype=torch.float32)


@torch.library.impl("specdec::flash_backward", "CompositeExplicitAutograd")
def _backward_op(*arguments):
    """Gradients of query, key and value by the Triton kernels."""
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
