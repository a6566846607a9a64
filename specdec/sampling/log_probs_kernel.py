"""The likeliest tokens of each row with their log-probabilities, in two launches that read the logits once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.scores_kernel import load_scores, weight_of
from specdec.sampling.top_kernel import largest_of

BLOCK = 2048  # scores that a program reads


@triton.jit
def _part_kernel(
    logits, heat, cuts, bands, values, indices, sums, size, row_stride, parts, K: tl.constexpr, SHIFT: tl.constexpr,
    HEATED: tl.constexpr, CUT: tl.constexpr, BANDED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of one block of one row: the K largest scores, the first of which is m, and the sum of exp(score - m)."""
    await_input(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    score = load_scores(logits, heat, cuts, bands, row, place, size, row_stride, SHIFT, HEATED, CUT, BANDED)
    tl.store(sums + row * parts + part, tl.sum(weight_of(score, tl.max(score, 0)), 0))
    first = (row * parts + part) * K
    largest_of(score, tl.where(place < size, place, 2147483647), values + first, indices + first, K)


@triton.jit
def _merge_kernel(
    part_values, part_indices, part_sums, values, indices, parts, K: tl.constexpr, PARTS: tl.constexpr,
    FOUND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The K largest among those of all blocks of one row, less the logarithm of the sum of all exp(score)."""
    await_input(OVERLAP)
    row, part, place = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, FOUND)
    largest = tl.load(part_values + (row * parts + part) * K, mask=part < parts, other=float("-inf"))
    sums = tl.load(part_sums + row * parts + part, mask=part < parts, other=0.0)
    top = tl.max(largest, 0)
    total = top + tl.log(tl.sum(tl.where(sums > 0, sums * tl.exp(largest - top), sums), 0))
    value = tl.load(part_values + row * parts * K + place, mask=place < parts * K, other=float("-inf"))
    index = tl.load(part_indices + row * parts * K + place, mask=place < parts * K, other=2147483647)
    log = tl.where(value - total > 0, 0.0, value - total)
    largest_of(tl.where(value == float("-inf"), value, log), index, values + row * K, indices + row * K, K)


def launch_top_log_probs(source: tuple, flags: dict, shape: torch.Size, count: int) -> tuple[Tensor, Tensor]:
    """See `specdec.sampling.draws.top_log_probs`; source, flags: see `Warped`; log-probabilities are float32."""
    logits = source[0]
    rows, size = logits.shape
    block = min(BLOCK, triton.next_power_of_2(size))
    parts, overlap = triton.cdiv(size, block), overlapping(logits.device)
    values = torch.empty(*shape[:-1], count, dtype=torch.float32, device=logits.device)
    indices = torch.empty_like(values, dtype=torch.int64)
    of_parts = values.new_empty(rows, parts * count), indices.new_empty(rows, parts * count, dtype=torch.int32)
    sums = values.new_empty(rows, parts)
    warps = min(16, max(1, block // 512))
    _part_kernel[(rows, parts)](
        *source, *of_parts, sums, size, logits.stride(0), parts, K=count, **flags, BLOCK=block, num_warps=warps,
        **overlap,
    )  # fmt: skip
    found = triton.next_power_of_2(parts * count)
    _merge_kernel[(rows,)](
        *of_parts, sums, values, indices, parts, K=count, PARTS=triton.next_power_of_2(parts), FOUND=found,
        num_warps=min(4, max(1, found // 128)), **overlap,
    )  # fmt: skip
    return values, indices
