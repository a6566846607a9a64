"""Scores that no kernel writes out: logits, divided by a temperature, without the tokens that warpers remove.

Every kernel that needs scores reads the logits and makes them again; see `specdec.sampling.warped`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping

BLOCK = 4096  # tokens of a row whose weights are summed together
ENOUGH = 2048  # programs that fill a GPU
MOST_BLOCKS = 8  # that a program reads one after the other where there are more


@triton.jit
def order_key(x, SHIFT: tl.constexpr):
    """An int32 that sorts like `x`, float32 whose SHIFT last bits are 0; NaN sorts highest, and -0 like 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 2147483647, ordered) >> SHIFT


@triton.jit
def of_key(key, SHIFT: tl.constexpr):
    """The number with this key."""
    ordered = key << SHIFT
    if SHIFT > 0:  # the last bits of a negative number's key are 1
        ordered = tl.where(key < 0, ordered | ((1 << SHIFT) - 1), ordered)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def divided(value, heat):
    """value / heat, rounded correctly, in a few operations."""
    inverse = tl.div_rn(1.0, heat)
    about = value * inverse
    nearest = tl.fma(tl.fma(-about, heat, value), inverse, about)
    # infinity leaves NaN over
    return tl.where(tl.abs(about) == float("inf"), about, tl.where(heat == float("inf"), about, nearest))


@triton.jit
def load_scores(
    logits, heat, cuts, bands, row, place, size, row_stride,
    SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """The scores of the tokens `place` of a row: float32, -inf where a warper has removed them or there is none."""
    value = tl.load(logits + row * row_stride + place, mask=place < size, other=float("-inf")).to(tl.float32)
    score = value
    if HEATED:
        score = divided(value, tl.load(heat + row))
    if CUT:
        key, lowest, first = order_key(value, SHIFT), tl.load(cuts + 2 * row), tl.load(cuts + 2 * row + 1)
        score = tl.where((key > lowest) | ((key == lowest) & (place >= first)) | (value != value), score, float("-inf"))
    if BANDED:
        lowest, highest = tl.load(bands + 2 * row), tl.load(bands + 2 * row + 1)
        score = tl.where((score < lowest) | (score > highest), float("-inf"), score)
    return score


@triton.jit
def weight_of(score, top):
    """exp(score - top), 0 at -inf also where all scores are."""
    return tl.exp(score - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def row_sums(largest, sums, row, parts, PARTS: tl.constexpr):
    """A row's largest score and, for each of its blocks, the factor exp(block's largest - row's) and the weight."""
    part = tl.arange(0, PARTS)
    of_part = tl.load(largest + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(of_part, 0)
    factor = tl.where(of_part == float("-inf"), 0.0, tl.exp((of_part - top).to(tl.float64)))
    return top, of_part, factor, tl.load(sums + row * parts + part, mask=part < parts, other=0.0) * factor


@triton.jit
def _sums_kernel(
    logits, heat, cuts, bands, largest, sums, moments, size, row_stride, parts, MOMENTS: tl.constexpr,
    SPAN: tl.constexpr, SHIFT: tl.constexpr, HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The largest score m of each block of one row, the sum of exp(score - m) and that of exp(score - m) * score."""
    await_input(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    for part in range(tl.program_id(1) * SPAN, tl.minimum(tl.program_id(1) * SPAN + SPAN, parts)):
        place = part * BLOCK + tl.arange(0, BLOCK)
        score = load_scores(
            logits, heat, cuts, bands, row, place, size, row_stride, SHIFT, HEATED, CUT, BANDED
        )  # fmt: skip
        top = tl.max(score, 0)
        weight = weight_of(score, top)
        tl.store(largest + row * parts + part, top)
        tl.store(sums + row * parts + part, tl.sum(weight.to(tl.float64), 0))
        if MOMENTS:
            product = tl.where(weight > 0, weight * score, 0.0)
            tl.store(moments + row * parts + part, tl.sum(product.to(tl.float64), 0))


def grid_of(rows: int, parts: int) -> tuple[tuple[int, int], int]:
    """The programs for `parts` blocks of each row, and how many blocks each reads."""
    span = min(MOST_BLOCKS, max(1, triton.next_power_of_2(rows * parts // ENOUGH + 1) // 2))
    return (rows, triton.cdiv(parts, span)), span


def block_of(size: int) -> dict:
    """Keywords for kernels that read rows of `size` scores block by block."""
    block = min(BLOCK, triton.next_power_of_2(size))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}


def launch_sums(source: "tuple", flags: dict, moments: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each block of each row the largest score m, the sum of exp(score - m) and, with `moments`, that of exp(score
    - m) * score: `[M, blocks]`. source, flags: see `Warped`."""
    logits = source[0]
    (count, size), block = logits.shape, block_of(logits.shape[1])
    parts = triton.cdiv(size, block["BLOCK"])
    largest = torch.empty(count, parts, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(largest, dtype=torch.float64)
    products = torch.empty_like(sums) if moments else None
    grid, span = grid_of(count, parts)
    _sums_kernel[grid](
        *source, largest, sums, sums if products is None else products, size, logits.stride(0), parts,
        MOMENTS=moments, SPAN=span, **flags, **block, **overlapping(logits.device),
    )  # fmt: skip
    return largest, sums, products
