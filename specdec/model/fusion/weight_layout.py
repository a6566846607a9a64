"""How a CPU reads the matrix of a linear layer fastest: by rows, as PyTorch stores it, or by columns.

Decoding multiplies a few rows by each matrix, so its time is that of reading the matrix. Some libraries for matrix
products read it twice as fast one way, others the other way; it is measured once in a process."""

import statistics
import time
from functools import cache

import torch
from torch import Tensor

LARGEST = 16 << 20  # bytes of a matrix that is moved; moving needs its memory once more for a moment
SIZE, COPIES, REPEATS = (512, 192), 48, 7  # of the trial: too large for the caches next to a core
GAIN = 0.9  # of the time by rows, at least, to be worth it


def wants_columns(weight: Tensor) -> bool:
    """Whether `weight [out, in]` is read faster by columns in products with a few rows."""
    small = weight.numel() * weight.element_size() <= LARGEST
    return weight.device.type == "cpu" and weight.ndim == 2 and small and columns_are_faster(weight.dtype)


@cache
@torch.inference_mode()
def columns_are_faster(dtype: torch.dtype) -> bool:
    """Measure products of one row with matrices in both layouts."""
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return False
    (out, width), generator = SIZE, torch.Generator().manual_seed(0)
    rows = [torch.randn(out, width, generator=generator).to(dtype) for _ in range(COPIES)]
    columns = [matrix.t().contiguous().t() for matrix in rows]
    x, times = torch.ones(1, width, dtype=dtype), dict[bool, list[float]]()
    for _ in range(REPEATS):
        for by_columns, matrices in ((False, rows), (True, columns)):
            began = time.perf_counter()
            for matrix in matrices:
                torch.nn.functional.linear(x, matrix)
            times.setdefault(by_columns, []).append(time.perf_counter() - began)
    return statistics.median(times[True]) < GAIN * statistics.median(times[False])


@torch.no_grad()
def join_columns(parameters: list[Tensor]) -> Tensor:
    """The parameters `[out, in]` as one matrix `[sum of out, in]` stored by columns; they become views of it."""
    total, width = sum(len(p) for p in parameters), parameters[0].shape[1]
    first, rows = parameters[0], [sum(len(p) for p in parameters[:index]) for index in range(len(parameters))]
    stored = {p.untyped_storage().data_ptr() for p in parameters}
    places = [p.storage_offset() - first.storage_offset() for p in parameters]
    if len(stored) == 1 and places == rows and all(p.stride() == (1, total) for p in parameters):  # joined before
        return first.detach().as_strided((total, width), (1, total))
    with torch.inference_mode(parameters[0].is_inference()):  # as they are, also in a call of the other kind
        joined = torch.cat([p.detach() for p in parameters]).t().contiguous().t()
        for parameter, start in zip(parameters, rows, strict=True):
            parameter.data = joined[start : start + len(parameter)]
    return joined
