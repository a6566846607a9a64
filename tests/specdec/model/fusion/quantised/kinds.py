"""Weights of every kind that a kernel reads, with random numbers."""

import math

import torch
from torch import Tensor

from specdec.model.fusion.quantised.packed import EightBitWeight, PackedWeight, pack_int4
from tests.attention.devices import DEVICE

KINDS = ["int8", "fp8", "fp8 128x128", "int8 1x64", "int4 16 float16 z", "int4 32 bfloat16 s", "int4 192 float16 s"] + [
    f"int4 128 {dtype} {zeros}" for dtype in ("float16", "bfloat16") for zeros in "zs"
]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def step_of(kind: str) -> int:
    """What the inner dimension is a multiple of."""
    words = kind.split()
    if words[0] == "int4":
        return math.lcm(int(words[1]), 64 if int(words[1]) < 64 else 128)
    return int(words[1].split("x")[1]) if len(words) > 1 else 1


def random_weight(kind: str, outputs: int, inner: int) -> PackedWeight:
    """Weights of about unit size; `kind` is one of KINDS: format, block, type of scales, integer zeros or shifts."""
    words = kind.split()
    if words[0] == "int4":
        group, dtype = int(words[1]), getattr(torch, words[2])
        scales = (0.1 + 0.2 * torch.rand(outputs, inner // group)).to(DEVICE, dtype)
        integer = words[3] == "z"
        zeros = integers(0, 17, *scales.shape) if integer else random(*scales.shape, dtype=dtype, seed=1)
        return pack_int4(integers(0, 16, outputs, inner), scales, zeros, group)
    tall, group = map(int, words[1].split("x")) if len(words) > 1 else (1, inner)
    values = integers(-127, 128, outputs, inner).to(torch.int8)
    if words[0] == "fp8":
        values = random(outputs, inner, dtype=torch.float32, seed=2).mul(40).to(torch.float8_e4m3fn)
    scales = (0.01 + 0.02 * torch.rand(-(-outputs // tall), -(-inner // group))).to(DEVICE)
    return EightBitWeight(values, scales, tall, group)
