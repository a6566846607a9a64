"""Triton kernel of `attention.kv.write`: stores keys and values of one layer in their slots, quantised if pages are.

One program takes one token and a block of its kv heads: it reads key and value (both loads are in flight before the
first store), finds each head's largest magnitude, divides, rounds and stores numbers and scale. The arithmetic is that
of `attention.kv.quantization`, operation by operation, so int8 pages agree with the reference bit for bit, and fp8
pages too on a GPU (Triton's interpreter rounds the cast to e4m3 wrongly where the rounding carries into the exponent).
"""

import triton
import triton.language as tl
from torch import Tensor

from attention.kv.quantization import SMALLEST_SCALE, largest
from attention.pdl_kernel import await_input, overlapping

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_ROUNDER = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds a float32 below 2^22 to the nearest even


@triton.jit
def _quantise(x, dtype: tl.constexpr, TOP: tl.constexpr):
    """x [heads, D] in float32 -> the numbers to store and the scales [heads]."""
    scale = tl.maximum(tl.max(tl.abs(x), 1) * (1 / TOP), _SMALLEST_SCALE)
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)  # max drops NaN
    q = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    q = tl.minimum(tl.maximum(q, -TOP), TOP)
    if dtype == tl.int8:
        q = (q + _ROUNDER) - _ROUNDER
    return q.to(dtype), scale


# one binary for all layers and batches
@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["slots"])
def _write_kernel(key, value, slots, key_pages, value_pages, key_scales, value_scales, layer,
                  key_t, key_g, key_d, value_t, value_g, value_d, key_layer, value_layer, scale_layer,
                  G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                  BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                  TOP: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Strides: key_t, key_g, key_d, … of the inputs, key_layer, … between layers.

    TOP 0: pages are not quantised; DV 0: values are in keys."""
    await_input(OVERLAP, True)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        head = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        key_mask = (head < G)[:, None] & (d < D)[None, :]
        value_mask = (head < G)[:, None] & (dv < DV)[None, :]
        key_from = key + token * key_t + head[:, None] * key_g + d[None, :] * key_d
        value_from = value + token * value_t + head[:, None] * value_g + dv[None, :] * value_d
        k = tl.load(key_from, mask=key_mask, other=0.0)
        if DV > 0:
            v = tl.load(value_from, mask=value_mask, other=0.0)
        row = layer.to(tl.int64)
        key_to = key_pages + row * key_layer + slot * (G * D) + head[:, None] * D + d[None, :]
        value_to = value_pages + row * value_layer + slot * (G * DV) + head[:, None] * DV + dv[None, :]
        if TOP == 0:
            tl.store(key_to, k, mask=key_mask)
            if DV > 0:
                tl.store(value_to, v, mask=value_mask)
        else:
            qk, k_scale = _quantise(k.to(tl.float32), key_pages.dtype.element_ty, TOP)
            qv, v_scale = _quantise(v.to(tl.float32), value_pages.dtype.element_ty, TOP)
            scale_at = row * scale_layer + slot * G + head
            tl.store(key_to, qk, mask=key_mask)
            tl.store(value_to, qv, mask=value_mask)
            tl.store(key_scales + scale_at, k_scale, mask=head < G)
            tl.store(value_scales + scale_at, v_scale, mask=head < G)


def pick_config(heads: int, key_dim: int, value_dim: int) -> dict:
    """Launch settings: all heads of a token in one program up to 4096 numbers, eight numbers a thread.

    Eight numbers of a 16-bit type are 16 bytes, the widest load."""
    block_d, block_dv = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    widest = max(block_d, block_dv)
    block_g = min(triton.next_power_of_2(heads), max(1, 4096 // widest))
    return dict(BLOCK_G=block_g, BLOCK_D=block_d, BLOCK_DV=block_dv, num_warps=min(8, max(1, block_g * widest // 256)))


def launch_write_kv(key_pages: Tensor, value_pages: Tensor | None, key_scales: Tensor | None,
                    value_scales: Tensor | None, key: Tensor, value: Tensor, slots: Tensor, layer: int,
                    kv_dtype: str | None) -> None:  # fmt: skip
    """Run `attention.kv.write.write_kv` on contiguous pages `[num_layers, num_pages, P, G, D]`.

    value_pages: None where values are in keys."""
    value_dim = 0 if value_pages is None else value.shape[2]
    if value_pages is None:
        value_pages, value = key_pages, key  # not used
    if not (key_pages.is_contiguous() and value_pages.is_contiguous()):
        raise ValueError(f"the pages must be contiguous, got strides {key_pages.stride()} and {value_pages.stride()}")
    tokens, heads, dim = key.shape
    if tokens == 0:
        return
    config = pick_config(heads, dim, value_dim or dim)
    if key_scales is None or value_scales is None:
        key_scales, value_scales, scale_layer = key_pages, value_pages, 0
    else:
        scale_layer = key_scales.stride(0)
    _write_kernel[(tokens, -(-heads // config["BLOCK_G"]))](
        key, value, slots, key_pages, value_pages, key_scales, value_scales, layer, *key.stride(), *value.stride(),
        key_pages.stride(0), value_pages.stride(0), scale_layer, G=heads, D=dim, DV=value_dim,
        TOP=0.0 if kv_dtype is None else largest(kv_dtype), **config, **overlapping(key.device),
    )  # fmt: skip
