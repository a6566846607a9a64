"""Weights that torchao quantised: `Int8Tensor`, `Float8Tensor`, `Int4Tensor` (its plain layout) and, of 4 and 8 bits,
`IntxUnpackedToInt8Tensor`; weights only."""

from typing import Any

import torch
from torch import Tensor, nn

from specdec.model.fusion.quantised.packed import SIXTEEN_BITS, EightBitWeight, Int4Weight, group_misfit, pack_int4
from specdec.model.fusion.quantised.reading import Reading, attribute, hooked, refused


def read_torchao(layer: nn.Module) -> Reading | None:
    """What is to be said of an `nn.Linear` with a weight of torchao's; None for any other layer."""
    data: Any = layer._parameters.get("weight")  # itself: its .data holds other tensors, of the same memory
    if data is None or not type(data).__module__.startswith("torchao.") or type(layer) is not nn.Linear:
        return None
    name = type(data).__name__
    if name not in ("Int8Tensor", "Float8Tensor", "Int4Tensor", "IntxUnpackedToInt8Tensor"):
        return refused(name, f"its weight is a {name}, for which there is no kernel")
    if "forward" in vars(layer) or hooked(layer):
        return refused(name, "it has hooks, or a forward of its own")
    if attribute(data, "act_quant_kwargs") is not None or attribute(data, "activation_dtype") == torch.float8_e4m3fn:
        return refused(name, "it quantises activations too, which is another function")
    if attribute(data, "act_pre_scale") is not None:
        return refused(name, "it scales activations first")
    if name == "IntxUnpackedToInt8Tensor":
        return _read_unpacked(data)
    if name == "Int4Tensor":
        why = group_misfit(data.shape[1], data.block_size[1])
        return refused(name, why) if why else Reading("int4", lambda: _int4(data))
    zero = attribute(data, "zero_point")
    if zero is not None and bool(zero.any()):
        return refused(name, "its numbers have zero points")
    if name == "Float8Tensor" and (data.qdata.dtype != torch.float8_e4m3fn or has_nan(data.qdata)):
        return refused(name, f"its numbers are {data.qdata.dtype}, or NaN")
    return Reading("int8" if name == "Int8Tensor" else "fp8", lambda: eight_bits(data.qdata, data.scale))


def _read_unpacked(data) -> Reading:
    """Numbers of up to 8 bits in bytes, with a scale and an integer zero for each output and group."""
    name, (tall, group), bits = type(data).__name__, data.block_size, {"torch.int4": 4, "torch.int8": 8}
    width, zero = bits.get(str(data.target_dtype)), data.zero_point
    why = None if width and tall == 1 else f"there is no kernel for {data.target_dtype} in blocks of {tall} outputs"
    if why is None and attribute(data, "activation_quantization") is not None:
        why = "it quantises activations too, which is another function"
    if why is None and width == 8 and bool(zero.any()):
        why = "its numbers have zero points"
    if why is None and width == 4:
        why = group_misfit(data.shape[1], group)
        if data.scale.dtype not in SIXTEEN_BITS:
            why = f"its scales are {data.scale.dtype}, not 16 bits"
    if why is not None:
        return refused(name, why)
    if width == 8:
        return Reading("int8", lambda: eight_bits(data.qdata, data.scale))
    whole = lambda x: x.to(torch.int32) + 8  # of -8 .. 7
    return Reading("int4", lambda: pack_int4(whole(data.qdata), data.scale, whole(zero), group))


def eight_bits(values: Tensor, scales: Tensor) -> EightBitWeight:
    """`values [out, in]` and their scales: one in all, or `[blocks of out, blocks of in]`, of equal size."""
    out, inner = values.shape
    scales = scales.float()
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(out, 1)
    scales = scales.reshape(len(scales), -1).contiguous()
    return EightBitWeight(values, scales, -(-out // len(scales)), -(-inner // scales.shape[1]))


def has_nan(values: Tensor) -> bool:
    """Whether e4m3 numbers hold a NaN, which kernels do not know."""
    return bool((values.view(torch.uint8) & 127 == 127).any())


def _int4(data) -> Int4Weight:
    low, high = data.qdata & 15, (data.qdata.view(torch.uint8) >> 4).to(torch.int8)
    numbers = torch.stack([low, high], -1).flatten(1) ^ 8  # two's complement to 0 .. 15
    return pack_int4(numbers, data.scale.t(), data.zero_point.t(), data.block_size[1])
