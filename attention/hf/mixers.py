"""Serves the recurrent functions of transformers' mixers over states that can be rolled back.

A mixer looks its convolution and its recurrence up in its module. There each is replaced, once and for all, by a
function that calls the original, unless this thread is in a forward of ours: only then do new tokens run from the
states of their sequences on. Without a cache of transformers' own, a mixer hands over exactly the new tokens."""

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attention.hf.probe import Probe, UnsupportedArchitecture
from attention.hf.twin import CallSlot
from attention.kv.layout import RecurrentLayer
from attention.recurrent.layer import run_recurrent

ORIGINAL = "_specdec_original"  # attribute of our functions: what they replaced
serving: ContextVar[CallSlot | None] = ContextVar("serving", default=None)  # the forward that this thread is in


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A call of a recurrent function: the `layer`, what its rule takes of the T packed tokens, and its result.

    result: the function's result, from the rule's outputs `[T, *]`.
    """

    layer: RecurrentLayer
    inputs: tuple[Tensor, ...]
    result: Callable[[Tensor], object]
    reads: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()


def _layer(kind: str, state: tuple[int, ...], inputs: tuple[Tensor, ...], *constants: Tensor) -> RecurrentLayer:
    return RecurrentLayer(
        kind, state, tuple(tuple(x.shape[1:]) for x in inputs), tuple(tuple(x.shape) for x in constants)
    )


def _convolution(hidden_states, weight, bias=None, activation=None, **kwargs) -> Recurrence:
    """`hidden_states [1, C, T]`, `weight [C, K]` -> `[1, C, T]`."""
    from transformers.activations import ACT2FN  # takes seconds

    inputs, width = (hidden_states[0].transpose(0, 1),), weight.shape[1]
    act = ACT2FN[activation] if activation is not None else lambda x: x
    constants = (weight,) if bias is None else (weight, bias)
    layer = _layer("convolution", (len(weight), width - 1), inputs)
    return Recurrence(layer, inputs, lambda out: act(out).transpose(0, 1)[None], constants=constants)


def _delta_rule(query, key, value, g, beta, use_qk_l2norm_in_kernel=False, scale=None, **kwargs) -> Recurrence:
    """`query`, `key [1, T, G, Dk]`, `value [1, T, H, Dv]`, `g [1, T, H]` or `[1, T, H, Dk]`, `beta [1, T, H]`
    -> `([1, T, H, Dv], None)`."""
    q, k, v, decay, b = (x[0].float() for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    inputs = k, v, decay if decay.ndim == 3 else decay[..., None], b
    layer = _layer("delta rule", (v.shape[1], k.shape[2], v.shape[2]), inputs)
    return Recurrence(layer, inputs, lambda out: (out[None].to(query.dtype), None), (q,))


def _state_space(hidden_states, dt, A, B, C, chunk_size=None, D=None, z=None, dt_bias=None, dt_softplus=False,
                 dt_limit=(0.0, float("inf")), **kwargs) -> Recurrence:  # fmt: skip
    """`hidden_states [1, T, H, P]`, `dt [1, T, H]`, `A [H]`, `B`, `C [1, T, G, N]` -> `[1, T, H, P]`."""
    x, step = hidden_states[0].float(), _step(dt, dt_bias, dt_softplus)[0].clamp(*dt_limit).float()
    b, c = B[0].float(), C[0].float()
    inputs = b, x * step[..., None], (A.float() * step)[..., None]
    layer = _layer("state space", (x.shape[1], b.shape[2], x.shape[2]), inputs)
    residual = 0 if D is None else D[..., None] * x
    return Recurrence(layer, inputs, lambda out: _gated((out + residual)[None], z), (c,))


def _selective_scan(hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                    **kwargs) -> Recurrence:  # fmt: skip
    """`hidden_states`, `dt [1, I, T]`, `A [I, N]`, `B`, `C [1, N, T]` -> `[1, I, T]`."""
    bias = None if delta_bias is None else delta_bias[:, None]
    step, x = _step(dt, bias, delta_softplus)[0].float().transpose(0, 1), hidden_states[0].transpose(0, 1)
    b, c, a = B[0].float().transpose(0, 1), C[0].float().transpose(0, 1), A.float()
    inputs = step, step * x.float(), b
    residual = 0 if D is None else D * x
    result = lambda out: _gated((out.to(x.dtype) + residual).transpose(0, 1)[None], z)
    return Recurrence(_layer("selective scan", tuple(a.shape), inputs, a), inputs, result, (c,), (a,))


def _step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _gated(out: Tensor, gate: Tensor | None) -> Tensor:
    return out if gate is None else out * F.silu(gate)


FUNCTIONS: dict[str, Callable[..., Recurrence]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space,
    "mamba_selective_scan": _selective_scan,
}
FUSED = "mamba2_split_conv1d_scan_combined"  # of a whole mixer, which goes on by itself where this answers None


def serve_mixers(model) -> bool:
    """Let the modules of `model` look up our functions -> whether there are any recurrent ones."""
    found = False
    for name in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[name]) if name in sys.modules else {}
        for function in FUNCTIONS:
            if callable(held := names.get(function)):
                found = True
                if not hasattr(held, ORIGINAL):
                    setattr(sys.modules[name], function, _served(held, FUNCTIONS[function]))
        if callable(held := names.get(FUSED)) and not hasattr(held, ORIGINAL):
            setattr(sys.modules[name], FUSED, _declined(held))
    return found


def _served(original: Callable, describe: Callable[..., Recurrence]) -> Callable:
    @functools.wraps(original)
    def function(*args, **kwargs):
        if torch.compiler.is_compiling() or (slot := serving.get()) is None:
            return original(*args, **kwargs)
        call = describe(*args, **kwargs)
        if isinstance(slot.batch, Probe):
            slot.batch.recur(call.layer, call.inputs[0].device)
            return original(*args, **kwargs)
        return _run(slot, call)

    vars(function)[ORIGINAL] = original
    return function


def _declined(original: Callable) -> Callable:
    @functools.wraps(original)
    def function(*args, **kwargs):
        if torch.compiler.is_compiling() or serving.get() is None:
            return original(*args, **kwargs)
        return None

    vars(function)[ORIGINAL] = original
    return function


def _run(slot: CallSlot, call: Recurrence):
    batch, number = slot.batch.recurrent, slot.recurred
    layers = () if batch is None else batch.states.places
    if number >= len(layers):
        raise UnsupportedArchitecture(
            f"calls recurrent functions more often than when it was probed ({len(layers)} times): a module was replaced"
        )
    expected = batch.states.pools[layers[number][0]].layer
    if call.layer != expected:
        raise UnsupportedArchitecture(f"calls recurrent functions of {call.layer} where it was probed with {expected}")
    slot.recurred += 1
    return call.result(run_recurrent(batch, number, call.inputs, call.reads, call.constants))
