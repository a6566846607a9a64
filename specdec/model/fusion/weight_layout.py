"""How matrices lie in memory: behind each other, or copied by columns for a CPU that reads them faster that way.

Decoding multiplies a few rows by each matrix, so its time is that of reading the matrix. PyTorch stores matrices by
rows; some libraries for matrix products read them twice as fast by columns, which is measured once in a process. The
model keeps its own: weights that are changed in place are noticed, and the copies made anew."""

import statistics
import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

MAX_BYTES = 64 << 20  # of all matrices of a model that is copied: a large model's memory is not doubled
SIZE, COPIES, REPEATS = (512, 192), 48, 7  # of the trial: too large for the caches next to a core
GAIN = 0.9  # of the time by rows, at most, to be worth it


class ColumnCopies:
    """The copies that were made of one model's weights, none for a model that is large, or elsewhere than on a CPU."""

    def __init__(self, model: nn.Module):
        self._made: list[tuple[list[Tensor], Tensor]] = []
        matrices = [p for p in model.parameters() if p.ndim == 2]
        small = sum(p.numel() * p.element_size() for p in matrices) <= MAX_BYTES
        self._wanted = small and all(p.device.type == "cpu" and columns_are_faster(p.dtype) for p in matrices)

    @torch.no_grad()
    def of(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The weights `[out, in]` as one matrix `[sum of out, in]` stored by columns; None where rows are as good."""
        if not self._wanted:
            return None
        with torch.inference_mode(False):
            copy = torch.cat([weight.detach() for weight in weights]).t().contiguous().t()
        self._made.append((list(weights), _mark(weights)))
        return copy

    @torch.no_grad()
    def current(self) -> bool:
        """Whether all weights are still what was copied."""
        return all(_mark(weights).equal(mark) for weights, mark in self._made)


def _mark(weights: Sequence[Tensor]) -> Tensor:
    """Bits that change whenever a weight does: of its product with a vector; of 16-bit rows their sums as integers."""
    if weights[0].dtype.itemsize == 2:
        return torch.cat([weight.detach().view(torch.int16).sum(1) for weight in weights])
    vector = _vector(weights[0].shape[1], weights[0].dtype)
    products = torch.cat([torch.mv(weight.detach(), vector) for weight in weights])
    return products.view(torch.int32 if products.dtype == torch.float32 else torch.int64)


@cache
@torch.inference_mode(False)
def _vector(width: int, dtype: torch.dtype) -> Tensor:
    return (1 + torch.rand(width, generator=torch.Generator().manual_seed(0))).to(dtype)


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
def adjacent(parameters: Sequence[Tensor]) -> Tensor:
    """Tensors as one, `[sum of rows, ...]`, of which they become views."""
    first, row = parameters[0], parameters[0].stride(0)
    offsets = [p.storage_offset() - first.storage_offset() for p in parameters]
    rows = [sum(len(p) for p in parameters[:index]) for index in range(len(parameters) + 1)]
    together = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parameters)
    if together and offsets == [row * n for n in rows[:-1]]:  # fused before
        return first.detach().as_strided((rows[-1], *first.shape[1:]), first.stride())
    with torch.inference_mode(first.is_inference()):  # as they are, also in a call of the other kind
        fused = torch.cat([p.detach() for p in parameters])
        for parameter, start, stop in zip(parameters, rows, rows[1:], strict=False):
            parameter.data = fused[start:stop]
    return fused
