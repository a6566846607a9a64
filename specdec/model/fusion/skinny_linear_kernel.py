"""Triton kernels for `specdec.model.fusion.skinny_linear`; each streams every weight once, with many loads in flight.

* One row: elementwise products with a few rows of the matrix, then sums.
* Up to SLICED_ROWS rows: tensor cores, each warp with a slice of the inner dimension; the slices are added at the end.
* More rows: larger tiles of weights. A matrix with too few tiles for the GPU is split along the inner dimension, and a
  second kernel adds the parts and, on request, computes the norm of the sum.

With programmatic dependent launch a kernel starts before the previous one ends, and prefetches its first weights before
it waits for its input. The preceding kernels must therefore not write the weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.gpu import multiprocessors, shared_memory
from attention.pdl_kernel import await_input, overlapping
from specdec.model.fusion.pointwise_kernel import normalised, one_row

SLICED_ROWS = 8  # a power of two; more rows use tiles
BLOCK_N, SLICES, BLOCK_K = 16, 4, 128  # tile of weights in the kernel of slices: the fastest of 44 on an H200
MOST_PARTS = 8  # into which the inner dimension is split


@triton.jit
def load(pointers, column, inner, EVEN: tl.constexpr):
    """A tile of weights, evicted first from the cache as it is read once; zeros past the inner dimension."""
    if EVEN:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        tile = tl.load(pointers, mask=column < inner, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def plus(total, more, place, inside, GIVEN: tl.constexpr):
    """`total` plus the elements at `place` of `more`, if GIVEN."""
    if GIVEN:
        total += tl.load(more + place, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def prefetch(first, inner, COUNT: tl.constexpr, OVERLAP: tl.constexpr, LINE: tl.constexpr = 64):
    """Prefetch the first COUNT of `inner` weights of each row into the L2 cache; LINE of them are 128 bytes."""
    if OVERLAP:
        lines: tl.constexpr = COUNT // LINE if COUNT > LINE else 1
        line = tl.arange(0, lines) * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [first[:, None] + tl.minimum(line, inner - 1)[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _one_row_kernel(x, weight, bias, added, out, outputs, inner, weight_row, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
                    OVERLAP: tl.constexpr):  # fmt: skip
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weights = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * weight_row + k[None, :]
    tile = load(weights, k[None, :], inner, EVEN)
    await_input(OVERLAP)
    total = tile.to(tl.float32) * tl.load(x + k, mask=k < inner, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK_K, inner, BLOCK_K):
        tile = load(weights + start, start + k[None, :], inner, EVEN)
        total += tile.to(tl.float32) * tl.load(x + start + k, mask=start + k < inner, other=0.0).to(tl.float32)[None, :]
    result = plus(tl.sum(total, 1), bias, n, n < outputs, BIAS)
    result = plus(result, added, n, n < outputs, ADDED)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < outputs)


@triton.jit
def _skinny_linear_kernel(x, weight, bias, added, out, rows, outputs, inner, weight_row,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
                          BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
                          BIAS: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    first = weight + tl.minimum(n, outputs - 1).to(tl.int64) * weight_row
    weights = first[None, :, None] + k[:, None, :]
    inputs = x + tl.minimum(m, rows - 1)[None, None, :] * inner + k[:, :, None]
    prefetch(first, inner, SLICES * BLOCK_K, OVERLAP)
    await_input(OVERLAP)
    total = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, inner, SLICES * BLOCK_K, num_stages=STAGES):
        tile = load(weights + start, start + k[:, None, :], inner, EVEN)
        if EVEN:
            values = tl.load(inputs + start)
        else:
            values = tl.load(inputs + start, mask=start + k[:, :, None] < inner, other=0.0)
        total = tl.dot(tile, values, total)
    place, inside = m[None, :] * outputs + n[:, None], (m < rows)[None, :] & (n < outputs)[:, None]
    result = plus(tl.sum(total, 0), bias, n[:, None], (n < outputs)[:, None], BIAS)
    result = plus(result, added, place, inside, ADDED)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile_kernel(x, weight, bias, added, out, rows, outputs, inner, weight_row, part,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                 EVEN: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Program (n, s): tile n of the outputs over `part` inner elements from s part on, `out [parts, rows, outputs]`."""
    m, n, k = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * part
    size = tl.minimum(part, inner - begin)
    first = weight + tl.minimum(n, outputs - 1).to(tl.int64) * weight_row + begin
    weights = first[:, None] + k[None, :]
    inputs = x + tl.minimum(m, rows - 1)[None, :] * inner + begin + k[:, None]
    prefetch(first, size, 2 * BLOCK_K, OVERLAP)
    await_input(OVERLAP)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        tile = load(weights + start, start + k[None, :], size, EVEN)
        if EVEN:
            values = tl.load(inputs + start)
        else:
            values = tl.load(inputs + start, mask=start + k[:, None] < size, other=0.0)
        total = tl.dot(tile, values, total)
    total = plus(total, bias, n[:, None], (n < outputs)[:, None], BIAS)
    place = (tl.program_id(1) * rows + m[None, :]) * outputs + n[:, None]
    inside = (m < rows)[None, :] & (n < outputs)[:, None]
    total = plus(total, added, place, inside, ADDED)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum(parts, bias, added, at, column, inside, size, PARTS: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr):
    total = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * size + at, mask=inside, other=0.0)
    total = plus(total, bias, column, inside, BIAS)
    return plus(total, added, at, inside, ADDED)


@triton.jit
def _add_kernel(parts, bias, added, out, size, outputs, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                BIAS: tl.constexpr, ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """`parts [PARTS, size]`, `bias [outputs]`, `added [size]` -> `out [size]`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    await_input(OVERLAP)
    total = _sum(parts, bias, added, at, at % outputs, inside, size, PARTS, BIAS, ADDED)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_and_norm_kernel(parts, bias, added, norm, out, normed, size, outputs, eps, PARTS: tl.constexpr,
                         OFFSET: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
                         ADDED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """As `_add_kernel`, with one row a program, and the row's norm with weight `norm [outputs]` -> `normed [size]`."""
    column = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0) * outputs + column, column < outputs
    await_input(OVERLAP, True)
    total = _sum(parts, bias, added, at, column, inside, size, PARTS, BIAS, ADDED).to(out.dtype.element_ty)
    tl.store(out + at, total, mask=inside)
    tl.store(
        normed + at,
        normalised(total, tl.load(norm + column, mask=inside, other=0.0), outputs, eps, OFFSET),
        mask=inside,
    )


def launch_skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None,
                    norm: tuple[Tensor, float, bool] | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`x [..., in]` @ `weight [out, in]`.T + `bias [out]` + `added [..., out]` -> `[..., out]`.

    The second result is its norm (`product_inputs.Norm`) where that takes no further launch, else None."""
    outputs, inner = weight.shape
    rows, out = x.reshape(-1, inner).contiguous(), x.new_empty(*x.shape[:-1], outputs)
    if not outputs:
        return out, None
    added = None if added is None else added.contiguous()
    tensors = rows, weight, bias, added
    options = dict(BIAS=bias is not None, ADDED=added is not None, **overlapping(x.device))
    if len(rows) == 1:
        block_k = min(2048, triton.next_power_of_2(inner))
        while block_k > 256 and inner % block_k:  # smaller blocks are better than a mask
            block_k //= 2
        block_n = max(1, 8192 // max(block_k, 512))
        _one_row_kernel[(triton.cdiv(outputs, block_n),)](
            *tensors, out, outputs, inner, weight.stride(0), BLOCK_N=block_n, BLOCK_K=block_k,
            EVEN=inner % block_k == 0, num_warps=8, **options)  # fmt: skip
    elif len(rows) <= SLICED_ROWS:
        deep = stages(x.device, SLICES * BLOCK_K * (BLOCK_N + SLICED_ROWS), 5)
        _skinny_linear_kernel[(triton.cdiv(outputs, BLOCK_N),)](
            *tensors, out, len(rows), outputs, inner, weight.stride(0), BLOCK_M=SLICED_ROWS,
            BLOCK_N=BLOCK_N, SLICES=SLICES, BLOCK_K=BLOCK_K, STAGES=deep,
            EVEN=inner % (SLICES * BLOCK_K) == 0, num_warps=SLICES, **options)  # fmt: skip
    else:
        return out, _launch_tiles(*tensors, out, options, norm)
    return out, None


def _launch_tiles(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, out: Tensor, options: dict,
                  norm: tuple[Tensor, float, bool] | None) -> Tensor | None:  # fmt: skip
    (outputs, inner), block_m = weight.shape, max(16, triton.next_power_of_2(len(rows)))
    block_n, part, count = split(rows.device, outputs, inner, BLOCK_K)
    parts, of_parts = room_for(count, out, options)
    _tile_kernel[(triton.cdiv(outputs, block_n), count)](
        rows, weight, bias, added, parts, len(rows), outputs, inner, weight.stride(0), part, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_K=BLOCK_K, STAGES=stages(rows.device, BLOCK_K * (block_n + block_m), 6),
        EVEN=inner % BLOCK_K == 0, num_warps=4, **of_parts)  # fmt: skip
    return add_parts(parts, count, bias, added, out, options, norm)


def split(device: torch.device, outputs: int, length: int, step: int) -> tuple[int, int, int]:
    """Outputs of a tile, length of a part of `length` in steps of `step`, and the number of parts.

    Tiles are of 128 outputs if every multiprocessor gets one, else of 64, with as many parts as run at once."""
    width = multiprocessors(device)
    block = 128 if outputs > 128 * (width - 1) else 64
    most = max(1, min(MOST_PARTS, width // triton.cdiv(outputs, block)))
    return block, *cut(length, step, most)


def cut(length: int, step: int, most: int) -> tuple[int, int]:
    """The length of each of up to `most` parts of `length` in whole steps, and the number of parts."""
    part = triton.cdiv(triton.cdiv(length, step), most) * step
    return part, triton.cdiv(length, part)


def room_for(count: int, out: Tensor, options: dict) -> tuple[Tensor, dict]:
    """Where tiles in `count` parts write, `out` itself or float32 `[count, size of out]`, and their options."""
    if count == 1:
        return out, options
    parts = torch.empty(count, out.numel(), dtype=torch.float32, device=out.device)
    return parts, options | dict(BIAS=False, ADDED=False)


def add_parts(parts: Tensor, count: int, bias: Tensor | None, added: Tensor | None, out: Tensor, options: dict,
              norm: tuple[Tensor, float, bool] | None) -> Tensor | None:  # fmt: skip
    """Add what `room_for` gave, `bias` and `added` up into `out`; with several parts also the norm is computed."""
    outputs, size = out.shape[-1], out.numel()
    if count == 1:
        return None
    if norm is None:
        _add_kernel[(triton.cdiv(size, 1024),)](
            parts, bias, added, out, size, outputs, PARTS=count, BLOCK=1024, **options
        )
        return None
    normed, (of_norm, eps, offset) = torch.empty_like(out), norm
    _add_and_norm_kernel[(size // outputs,)](parts, bias, added, of_norm, out, normed, size, outputs, eps,
                                             PARTS=count, OFFSET=offset, **one_row(outputs), **options)  # fmt: skip
    return normed


def stages(device: torch.device, piece: int, most: int) -> int:
    """The number of pipeline stages of `piece` 16-bit numbers each, up to `most`, that fit into shared memory."""
    return max(1, min(most, shared_memory(device) // (2 * piece)))
