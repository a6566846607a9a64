"""Repetition penalty and n-grams of `specdec.sampling.prefix_processors`, one Triton kernel each.

A program takes a block of a row's text at one node; the first one takes the node's path too. Nothing is read where
another program writes, and several programs that write to one token write the same."""

import triton
import triton.language as tl
from torch import Tensor

from attention.pdl_kernel import await_input, overlapping
from specdec.sampling.prefixes import Prefixes

BLOCK = 512  # tokens of a text that a program reads


@triton.jit
def _penalise(scores, before, token, by):
    """Write the penalised scores of tokens; -1: none."""
    old = tl.load(before + token, mask=token >= 0, other=0.0).to(tl.float32)
    tl.store(scores + token, tl.where(old < 0, old * by, tl.div_rn(old, by)), mask=token >= 0)


@triton.jit
def _repetition_kernel(
    scores, before, penalties, starts, front, tokens, lengths, paths, depths, size, capacity, nodes, deepest,
    depth_row, depth_node, BLOCK: tl.constexpr, PATH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_input(OVERLAP)
    at, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, node = at // nodes, at % nodes
    scores, before, paths = scores + at * size, before + at * size, paths + at * deepest
    length, by = tl.load(lengths + row), tl.load(penalties + row).to(tl.float32)
    start = tl.load(starts + row).to(tl.int64)
    start = tl.where(start > 0, start + front, 0)
    place = part * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row * capacity + place, mask=(place >= start) & (place < length), other=-1)
    _penalise(scores, before, token, by)
    if part == 0:
        step, depth = tl.arange(0, PATH), tl.load(depths + row * depth_row + node * depth_node)
        drafted = tl.load(paths + step, mask=(step < depth) & (length + step >= start), other=-1)
        _penalise(scores, before, drafted, by)


@triton.jit
def _token(tokens, length, paths, place, wanted):
    """The tokens at `place`, counted from the end of the row's own text; -1 before its beginning."""
    own = tl.load(tokens + length + place, mask=wanted & (place < 0) & (length + place >= 0), other=-1)
    return tl.where(place < 0, own, tl.load(paths + place, mask=wanted & (place >= 0), other=-1))


@triton.jit
def _ngram_kernel(
    scores, tokens, lengths, paths, depths, size, capacity, nodes, deepest, depth_row, depth_node,
    N: tl.constexpr, BLOCK: tl.constexpr, PATH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Forbid the token behind each of the n - 1 tokens with which the text at a node ends."""
    await_input(OVERLAP)
    at, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, node = at // nodes, at % nodes
    scores, tokens, paths = scores + at * size, tokens + row * capacity, paths + at * deepest
    length, depth = tl.load(lengths + row), tl.load(depths + row * depth_row + node * depth_node)
    place = part * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + place, mask=place < length, other=-1)
    same = token >= 0
    for back in tl.static_range(1, N):
        last = _token(tokens, length, paths, depth - back, True)
        earlier = tl.load(tokens + place - back, mask=same & (place >= back), other=-1)
        same = same & (last >= 0) & (earlier == last)
    tl.store(scores + token, float("-inf"), mask=same)
    if part == 0:
        step = tl.arange(0, PATH)
        drafted = tl.load(paths + step, mask=step < depth, other=-1)
        again = drafted >= 0
        for back in tl.static_range(1, N):
            last = _token(tokens, length, paths, depth - back, True)
            again = again & (last >= 0) & (_token(tokens, length, paths, step - back, again) == last)
        tl.store(scores + drafted, float("-inf"), mask=again)


def _launch(kernel, scores: Tensor, leading: list, prefixes: Prefixes, **constants) -> None:
    (rows, nodes, deepest), (capacity, size) = prefixes.paths.shape, (prefixes.tokens.shape[1], scores.shape[2])
    depths = prefixes.depths.expand(rows, nodes)
    kernel[(rows * nodes, triton.cdiv(capacity, BLOCK))](
        scores, *leading, prefixes.tokens.contiguous(), prefixes.lengths, prefixes.paths.contiguous(), depths,
        size, capacity, nodes, deepest, *depths.stride(), BLOCK=BLOCK, PATH=triton.next_power_of_2(max(1, deepest)),
        num_warps=4, **constants, **overlapping(scores.device),
    )  # fmt: skip


def launch_repetition(scores: Tensor, before: Tensor, penalties: Tensor, starts: Tensor, front: int,
                      prefixes: Prefixes) -> None:  # fmt: skip
    """See `prefix_processors._repetition`; in place on float32 `scores [A, n, V]`.

    before [A, n, V]: the same, in memory of its own and of any dtype
    penalties, starts [A] float64; front: tokens before the texts, which `prefixes` includes
    """
    _launch(_repetition_kernel, scores, [before.contiguous(), penalties, starts, front], prefixes)


def launch_ngram(scores: Tensor, size: int, prefixes: Prefixes) -> None:
    """See `prefix_processors._ngram`; in place on float32 `scores [A, n, V]`."""
    _launch(_ngram_kernel, scores, [], prefixes, N=size)
