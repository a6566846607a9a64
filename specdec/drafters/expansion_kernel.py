"""Triton kernel of `specdec.drafters.expansion`: one program grows one row's tree by a level."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.drafters.expansion import Candidates, Chosen, Run
from specdec.drafters.grown_kernel import comparable


@triton.jit
def _expand_kernel(
    root, likelihoods, likely, ids, value, candidate, place, depths, words, tokens_out, values_out, parents_out,
    value_out, candidate_out, place_out, depths_out, words_out, chosen_out, above_out, room, first, ran, level,
    P: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, RAN: tl.constexpr, OLD: tl.constexpr, NEW: tl.constexpr,
    IDS: tl.constexpr, ROOT: tl.constexpr, LAST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row; with ROOT the last level is the root, of which nothing is given but its token."""
    await_input(OVERLAP)
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, node = c < P * W, tl.minimum(c // W, P - 1)
    token = tl.load(likely + row * P * W + c, mask=inside, other=0)
    if IDS:
        token = tl.load(ids + token, mask=inside, other=0)
    total = tl.load(likelihoods + row * P * W + c, mask=inside, other=float("-inf"))
    tokens_out, values_out, parents_out = tokens_out + row * room, values_out + row * room, parents_out + row * room
    if ROOT:
        above, parent = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
        tl.store(tokens_out, tl.load(root + row))
        tl.store(values_out, float("inf"))
        tl.store(parents_out, -1)
    else:
        total = tl.load(value + row * P + node) + total
        above, parent = tl.load(candidate + row * P + node), tl.load(place + row * P + node)
    tl.store(tokens_out + first + c, token, mask=inside)
    tl.store(values_out + first + c, total, mask=inside)
    tl.store(parents_out + first + c, above, mask=inside)
    if not LAST:
        known = comparable(total)
        better = (known[None, :] > known[:, None]) | ((known[None, :] == known[:, None]) & (c[None, :] < c[:, None]))
        rank = tl.sum((better & inside[None, :]).to(tl.int32), 1)
        chosen = inside & (rank < W)
        slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
        to, size = row * W + slot, ran + W
        tl.store(value_out + to, total, mask=chosen)
        tl.store(candidate_out + to, first + c, mask=chosen)
        tl.store(place_out + to, ran + slot, mask=chosen)
        tl.store(chosen_out + to, token, mask=chosen)
        tl.store(above_out + to, node, mask=chosen)
        tl.store(depths_out + row * size + ran + slot, level, mask=chosen)
        r = tl.arange(0, RAN)
        held = tl.zeros([RAN], tl.int64)
        if not ROOT:
            held = tl.load(depths + row * ran + r, mask=r < ran, other=0)
        tl.store(depths_out + row * size + r, held, mask=r < ran)
        for word in tl.static_range(NEW):
            held, known_word = tl.zeros([RAN], tl.int64), tl.zeros([BLOCK], tl.int64)
            if ROOT:
                if word == 0:
                    held, known_word = held + 1, known_word + 1
            elif word < OLD:
                held = tl.load(words + (row * ran + r) * OLD + word, mask=r < ran)
                known_word = tl.load(words + (row * ran + parent) * OLD + word)
            tl.store(words_out + (row * size + r) * NEW + word, held, mask=r < ran)
            bit = (ran + slot - 64 * word).to(tl.int64)
            mine = (bit >= 0) & (bit < 64)
            itself = tl.where(mine, tl.full([BLOCK], 1, tl.int64) << tl.where(mine, bit, 0), 0)
            tl.store(words_out + (row * size + ran + slot) * NEW + word, known_word | itself, mask=chosen)


def launch_expand(run: Run | None, root: Tensor, found: Candidates, likelihoods: Tensor, likely: Tensor,
                  ids: Tensor | None, level: int, last: bool) -> tuple[Run, Chosen] | None:  # fmt: skip
    """See `expansion._expand`; the new candidates go to their places in `found`. run: None at the root."""
    count, nodes, width = likely.shape
    old, ran = (1, 1) if run is None else (run.words.shape[2], run.depths.shape[1])
    first = 1 if run is None else 1 + width + (level - 2) * width * width
    new, size = -(-(ran + width) // 64), ran + width
    long = lambda *shape: torch.empty(count, *shape, dtype=torch.int64, device=likely.device)
    grown = Run(found.values.new_empty(count, width), long(width), long(width), long(size), long(size, new))
    chosen, given = Chosen(long(width), long(width)), grown if run is None else run
    held = given.value, given.candidate, given.place, given.depths, given.words
    outputs = grown.value, grown.candidate, grown.place, grown.depths, grown.words
    _expand_kernel[(count,)](
        root.contiguous(), likelihoods.contiguous(), likely.contiguous(), likely if ids is None else ids, *held,
        found.tokens, found.values, found.parents, *outputs, chosen.tokens, chosen.above, found.tokens.shape[1], first,
        ran, level, P=nodes, W=width, BLOCK=triton.next_power_of_2(nodes * width), RAN=triton.next_power_of_2(ran),
        OLD=old, NEW=new, IDS=ids is not None, ROOT=run is None, LAST=last, num_warps=4, **overlapping(likely.device),
    )  # fmt: skip
    return None if last else (grown, chosen)
