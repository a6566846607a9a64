"""4-bit layers as GPTQModel and AutoAWQ hold them: `qweight`, `qzeros` and `scales`, both packings.

GPTQ packs eight inner positions of an output into an int32, AWQ eight outputs of a position, in the order AWQ_ORDER.
Only modules that keep the checkpoint's tensors are read: others (Marlin, ExLlama) shuffle them for their kernels."""

import torch
from torch import Tensor, nn

from specdec.model.fusion.quantised.packed import SIXTEEN_BITS, Int4Weight, group_misfit, pack_int4
from specdec.model.fusion.quantised.reading import Reading, attribute, hooked, refused

GPTQ = ("TorchQuantLinear", "TorchLinear", "TritonV2QuantLinear", "TritonV2Linear")
AWQ = ("AwqTorchQuantLinear", "AwqTorchLinear", "AwqGEMMQuantLinear", "AwqGEMMLinear", "WQLinear_GEMM")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of each four bits, from the lowest on


def read_gptq(layer: nn.Module) -> Reading | None:
    """What is to be said of a GPTQ or AWQ layer; None for any other layer."""
    name = type(layer).__name__
    tensors: list = [attribute(layer, key) for key in ("qweight", "qzeros", "scales")]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    if name not in GPTQ + AWQ:
        return refused(name, f"{name} keeps weights in a layout of its own")
    qweight, qzeros, scales = tensors
    inner = qweight.shape[0] * (1 if name in AWQ else 8)
    group = inner // max(1, scales.shape[0])
    bits = attribute(layer, "bits") or attribute(layer, "w_bit")
    if bits != 4 or qweight.dtype != torch.int32:
        return refused(name, f"it has {bits} bits in {qweight.dtype}")
    if "forward" in vars(layer) or hooked(layer) or attribute(layer, "adapter") is not None:
        return refused(name, "it has hooks, an adapter, or a forward of its own")
    if scales.dtype not in SIXTEEN_BITS:
        return refused(name, f"its scales are {scales.dtype}")
    if why := group_misfit(inner, group):
        return refused(name, why)
    order = attribute(layer, "g_idx")
    if name in GPTQ and isinstance(order, Tensor) and order.numel():
        if not order.long().equal(torch.arange(inner, device=order.device) // group):
            return refused(name, "its inner positions are in the order of activations (act-order)")
    if name in GPTQ and _zero_format(layer) is None:
        return refused(name, "it does not say whether its zeros are stored less one")
    if name in GPTQ and _zero_format(layer) == 1 and bool((_unpack(qzeros, range(8)) == 15).any()):
        return refused(name, "a zero of 15 stored less one means 0 or 16, by the package's version")
    if name in AWQ:
        return Reading("int4", lambda: _awq(qweight, qzeros, scales, group))
    return Reading("int4", lambda: _gptq(layer, qweight, qzeros, scales, group))


def _zero_format(layer: nn.Module) -> int | None:
    """1: zeros are stored less one (checkpoints of format "gptq"), 2: as they are."""
    found = attribute(layer, "qzero_format")
    return found() if callable(found) else None


def _gptq(layer: nn.Module, qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Int4Weight:
    zeros = _unpack(qzeros, range(8)) + (1 if _zero_format(layer) == 1 else 0)
    return pack_int4(_unpack(qweight.t(), range(8)), scales.t(), zeros.t(), group)


def _awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int) -> Int4Weight:
    return pack_int4(_unpack(qweight, AWQ_ORDER).t(), scales.t(), _unpack(qzeros, AWQ_ORDER).t(), group)


def _unpack(words: Tensor, order) -> Tensor:
    """int32 `[a, b]` -> 0 to 15 `[a, 8 b]`; the i-th four bits of a word are its number `order[i]`."""
    numbers = torch.stack([(words >> 4 * order.index(place)) & 15 for place in range(8)], -1)
    return numbers.flatten(1)
