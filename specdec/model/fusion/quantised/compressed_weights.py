"""Layers of compressed-tensors checkpoints, in 4 or 8 bits with 16-bit activations, as transformers holds them.

Such a model unpacks itself before its first forward and computes in 16 bits from then on. The packed numbers are found
again from the unpacked ones and their scales, exactly, and are checked to give the same 16-bit numbers."""

import torch
from torch import Tensor, nn

from specdec.model.fusion.quantised.packed import (
    SIXTEEN_BITS,
    EightBitWeight,
    Int4Weight,
    PackedWeight,
    group_misfit,
    pack_int4,
)
from specdec.model.fusion.quantised.reading import Reading, attribute, hooked, refused
from specdec.model.fusion.quantised.torchao_weights import eight_bits

KINDS = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}


def read_compressed(layer: nn.Module) -> Reading | None:
    """What is to be said of a layer with a quantisation scheme of compressed-tensors; None for any other layer."""
    scheme = attribute(layer, "quantization_scheme")
    if scheme is None or not type(scheme).__module__.startswith("compressed_tensors.") or type(layer) is not nn.Linear:
        return None
    name, args = "compressed-tensors", scheme.weights
    weight, scale = layer._parameters.get("weight"), layer._parameters.get("weight_scale")
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return refused(name, "it quantises activations too, which is another function")
    if args is None or weight is None or scale is None or weight.dtype not in SIXTEEN_BITS or hooked(layer):
        return refused(name, "its weight is not unpacked yet, or it has hooks")
    kind = KINDS.get((getattr(args.type, "value", args.type), args.num_bits))
    if kind is None or (not args.symmetric and kind != "int4") or attribute(layer, "weight_g_idx") is not None:
        return refused(name, f"there is no kernel for its {args.num_bits} bits ({args.type}), zero points or act-order")
    inner, zero = weight.shape[1], layer._parameters.get("weight_zero_point")
    if kind == "int4" and (why := group_misfit(inner, inner // scale.shape[-1])):
        return refused(name, why)

    def pack() -> PackedWeight | None:
        packed = _int4(weight, scale, zero) if kind == "int4" else _eight_bits(weight, scale, kind)
        return packed if packed.dequantise(weight.dtype).equal(weight) else None

    return Reading(kind, pack)


def _int4(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Int4Weight:
    group, scale = weight.shape[1] // scale.shape[1], scale.to(weight.dtype)
    zeros = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero.to(torch.int32)
    wide = scale.float().repeat_interleave(group, 1)
    numbers = (weight.float() / wide).round() + zeros.repeat_interleave(group, 1) + 8
    return pack_int4(numbers.clamp(0, 15).to(torch.uint8), scale, zeros + 8, group)


def _eight_bits(weight: Tensor, scale: Tensor, kind: str) -> EightBitWeight:
    values = torch.zeros_like(weight, dtype=torch.int8)
    wide = eight_bits(values, scale)
    scales = EightBitWeight(torch.ones_like(values), wide.scales, wide.tall, wide.group).dequantise(torch.float32)
    numbers = weight.float() / scales
    values = numbers.round().to(torch.int8) if kind == "int8" else numbers.to(torch.float8_e4m3fn)
    return eight_bits(values, scale)
