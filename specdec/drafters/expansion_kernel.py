"""Triton kernels for `specdec.drafters.expansion`: one program grows one row's tree by a level, or chooses from it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.drafters.expansion import Chosen, Run

CHUNK = 32  # candidates that all others are compared with at once


@triton.jit
def _comparable(value):
    """Values with NaN, of rows that are reported as faulty, last."""
    return tl.where(value != value, float("-inf"), value)


@triton.jit
def _expand_kernel(
    likelihoods, likely, value, candidate, place, depths, words, tokens_out, values_out, parents_out, value_out,
    candidate_out, place_out, depths_out, words_out, chosen_out, above_out, parent_out, first, ran, level,
    P: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr,
    LAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_input(OVERLAP)
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, node = c < P * W, tl.minimum(c // W, P - 1)
    token = tl.load(likely + row * P * W + c, mask=inside, other=0)
    log = tl.load(likelihoods + row * P * W + c, mask=inside, other=float("-inf"))
    total = tl.load(value + row * P + node) + log
    tl.store(tokens_out + row * P * W + c, token, mask=inside)
    tl.store(values_out + row * P * W + c, total, mask=inside)
    tl.store(parents_out + row * P * W + c, tl.load(candidate + row * P + node), mask=inside)
    if not LAST:
        known = _comparable(total)
        better = (known[None, :] > known[:, None]) | ((known[None, :] == known[:, None]) & (c[None, :] < c[:, None]))
        rank = tl.sum((better & inside[None, :]).to(tl.int32), 1)
        chosen = inside & (rank < W)
        slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
        to, parent, size = row * W + slot, tl.load(place + row * P + node), ran + W
        tl.store(value_out + to, total, mask=chosen)
        tl.store(candidate_out + to, first + c, mask=chosen)
        tl.store(place_out + to, ran + slot, mask=chosen)
        tl.store(chosen_out + to, token, mask=chosen)
        tl.store(above_out + to, node, mask=chosen)
        tl.store(parent_out + to, parent, mask=chosen)
        tl.store(depths_out + row * size + ran + slot, level, mask=chosen)
        r = tl.arange(0, ROOM)
        tl.store(depths_out + row * size + r, tl.load(depths + row * ran + r, mask=r < ran), mask=r < ran)
        for word in tl.static_range(NEW):
            held, known_word = tl.zeros([ROOM], tl.int64), tl.zeros([BLOCK], tl.int64)
            if word < OLD:
                held = tl.load(words + (row * ran + r) * OLD + word, mask=r < ran)
                known_word = tl.load(words + (row * ran + parent) * OLD + word)
            tl.store(words_out + (row * size + r) * NEW + word, held, mask=r < ran)
            bit = (ran + slot - 64 * word).to(tl.int64)
            mine = (bit >= 0) & (bit < 64)
            itself = tl.where(mine, tl.full([BLOCK], 1, tl.int64) << tl.where(mine, bit, 0), 0)
            tl.store(words_out + (row * size + ran + slot) * NEW + word, known_word | itself, mask=chosen)


def launch_expand(run: Run, likelihoods: Tensor, likely: Tensor, first: int, level: int, last: bool
                  ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Run, Chosen] | None]:  # fmt: skip
    """See `expansion._expand`."""
    count, nodes, width = likely.shape
    old, ran = run.words.shape[2], run.depths.shape[1]
    new, size = -(-(ran + width) // 64), ran + width
    long = lambda *shape: torch.empty(count, *shape, dtype=torch.int64, device=likely.device)
    values = torch.empty(count, nodes * width, dtype=torch.float32, device=likely.device)
    candidates = long(nodes * width), values, long(nodes * width)
    grown = Run(values.new_empty(count, width), long(width), long(width), long(size), long(size, new))
    chosen = Chosen(long(width), long(width), long(width))
    given = run.value, run.candidate, run.place, run.depths, run.words
    outputs = grown.value, grown.candidate, grown.place, grown.depths, grown.words
    block = triton.next_power_of_2(nodes * width)
    _expand_kernel[(count,)](
        likelihoods.contiguous(), likely.contiguous(), *given, *candidates, *outputs, chosen.tokens, chosen.above,
        chosen.parent, first, ran, level, P=nodes, W=width, BLOCK=block, ROOM=triton.next_power_of_2(ran), OLD=old,
        NEW=new, LAST=last, num_warps=4, **overlapping(likely.device),
    )  # fmt: skip
    return candidates, None if last else (grown, chosen)


@triton.jit
def _choose_kernel(
    tokens, values, parents, position, tokens_out, parents_out, count, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    await_input(OVERLAP)
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = c < count
    value = tl.load(values + row * count + c, mask=inside, other=float("-inf"))
    known, rank = _comparable(value), tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = _comparable(tl.load(values + row * count + other, mask=other < count, other=float("-inf")))
        earlier = (theirs[None, :] == known[:, None]) & (other[None, :] < c[:, None])
        better = ((theirs[None, :] > known[:, None]) | earlier) & (other < count)[None, :]
        rank += tl.sum(better.to(tl.int32), 1)
    chosen = inside & (rank < size)
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(position + row * count + c, tl.where(chosen, place, 0), mask=inside)
    tl.debug_barrier()  # all positions are there before parents look for theirs
    parent = tl.load(parents + row * count + c, mask=chosen, other=-1)
    # isfinite, for which NaN is not
    exists = (parent >= 0) & (tl.abs(value) < float("inf"))
    above = tl.load(position + row * count + parent, mask=chosen & exists, other=0)
    tl.store(parents_out + row * size + place, tl.where(exists, above, -1), mask=chosen)
    token = tl.load(tokens + row * count + c, mask=chosen, other=0)
    tl.store(tokens_out + row * size + place, token, mask=chosen)


def launch_choose(tokens: Tensor, values: Tensor, parents: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Tokens and parents `[A, size]` of the best candidates `[A, C]`; see `grown.tree_of`."""
    rows, count = values.shape
    found = tokens.new_empty(rows, size), tokens.new_empty(rows, size)
    block, position = triton.next_power_of_2(count), torch.empty_like(parents)
    _choose_kernel[(rows,)](
        tokens, values, parents, position, *found, count, size, BLOCK=block, CHUNK=CHUNK,
        num_warps=max(1, min(16, block // 64)), **overlapping(tokens.device),
    )  # fmt: skip
    return found
