"""The random numbers of a round in one launch: `specdec.sampling.noise.noise_of_rows`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.noise import Stream


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _noise_kernel(keys, lengths, numbers, count, NEXT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """All numbers of one stream of one row; after the streams the first one of stream NEXT at each further length."""
    await_input(OVERLAP)
    row, stream, streams = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    place = tl.arange(0, BLOCK)
    along = stream == streams - 1
    length = tl.load(lengths + row) + 1 + tl.where(along, place, 0)
    key = _mix(key + length.to(tl.uint64, bitcast=True) * golden)
    index = tl.where(along, 1, place + 1)
    counter = index.to(tl.uint64) + (tl.where(along, NEXT, stream + 1).to(tl.uint64) << 40)
    z = _mix(_mix(key + counter * golden))
    number = (z >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
    tl.store(numbers + (row * streams + stream) * count + place, number, mask=place < count)


def launch_noise(keys: Tensor, lengths: Tensor, streams: int, count: int) -> Tensor:
    """`[A, streams + 1, count]` float64: the first numbers of every stream, then `RoundNoise.along`."""
    numbers = torch.empty(len(keys), streams + 1, count, dtype=torch.float64, device=keys.device)
    _noise_kernel[(len(keys), streams + 1)](
        keys.contiguous(), lengths.contiguous(), numbers, count, int(Stream.NEXT), triton.next_power_of_2(count),
        num_warps=1, **overlapping(keys.device),
    )  # fmt: skip
    return numbers
