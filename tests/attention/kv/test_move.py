"""Row moves against one move after the other in plain Python, on a GPU or in Triton's interpreter."""

from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attention.kv.cache
from attention import PagedKVCache
from attention.dispatch import triton_available
from attention.kv.move import move_rows
from attention.kv.write import write_kv
from tests.attention.devices import DEVICE

needs_triton = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
every_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
LAYERS, ROWS = 2, 40
WIDTHS = ((torch.float16, 160), (torch.float8_e4m3fn, 24), (torch.float32, 2), (torch.float32, 1))


def tensors(kinds=WIDTHS) -> list[Tensor]:
    """Every row of every layer and tensor has bytes of its own."""
    out = []
    for seed, (dtype, width) in enumerate(kinds):
        size = (LAYERS, ROWS, width * dtype.itemsize)
        out.append(
            torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
            .to(DEVICE)
            .view(dtype)
        )
    return out


def one_after_the_other(rows: Tensor, moves: list[tuple[int, int]]) -> Tensor:
    rows = rows.view(torch.uint8).clone()
    for source, target in moves:
        if source >= 0 and target >= 0:
            rows[:, target] = rows[:, source]
    return rows


def check(segments: list[list[tuple[int, int]]], impl: str, kinds=WIDTHS) -> None:
    moves = [move for segment in segments for move in segment]
    cumulative = [sum(map(len, segments[:n])) for n in range(len(segments) + 1)]
    ours = tensors(kinds)
    expected = [one_after_the_other(rows, moves) for rows in ours]
    sources, targets = ([move[side] for move in moves] for side in (0, 1))
    move_rows(
        ours, *(torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in (sources, targets, cumulative)), impl=impl
    )
    assert all(torch.equal(rows.view(torch.uint8), wanted) for rows, wanted in zip(ours, expected, strict=True))


@st.composite
def committed_paths(draw) -> list[list[tuple[int, int]]]:
    """Paths through the trees of one to three sequences whose rows are scattered; some moves are switched off."""
    order = draw(st.permutations(range(ROWS)))
    segments = []
    for first in range(0, draw(st.integers(1, 3)) * 13, 13):
        path = sorted(draw(st.sets(st.integers(0, 12))))
        off = draw(st.sets(st.integers(0, 12), max_size=2))
        segments.append(
            [(-1 if i in off else order[first + offset], order[first + i]) for i, offset in enumerate(path)]
        )
    return segments


@every_impl
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(segments=committed_paths())
def test_paths_of_several_sequences(impl, segments):
    check(segments, impl, WIDTHS[1:3])


@every_impl
def test_a_long_path_crosses_the_kernels_tiles(impl):
    """30 overlapping moves, more than are read at once, each target the source of an earlier move."""
    check([[(10 + m, 5 + m) for m in range(30)]], impl)
    check([[(m + 1, m) for m in range(39)]], impl)


@every_impl
def test_moves_that_do_nothing(impl):
    check([[(-1, 3), (4, 4), (7, -1), (9, 5)], [], [(-2, -2)]], impl)
    check([], impl)
    check([[], []], impl)


@every_impl
@pytest.mark.parametrize(
    "kinds",
    [
        ((torch.int8, 7),),
        ((torch.int8, 6), (torch.float32, 3)),
        ((torch.bfloat16, 2500),),
        ((torch.float64, 5),),
        ((torch.float32, 1), (torch.float16, 1)),
    ],
)
def test_rows_of_any_size(kinds, impl):
    """Odd numbers of bytes, rows wider than one program, rows of different widths."""
    check([[(3, 1), (4, 2)], [(39, 0)], [(20, 21)]], impl, kinds)


@every_impl
@pytest.mark.parametrize(("first", "width"), [(1, 4), (3, 8), (2, 2), (4, 8)])
def test_rows_that_are_pieces_of_longer_ones(first, width, impl):
    """Strides and offsets that 32-bit words divide, or not; the rest of each long row stays as it was."""
    (ours,) = tensors(((torch.int8, 12),))
    expected = ours.clone()
    expected[:, 5, first : first + width] = ours[:, 30, first : first + width]
    move_rows(
        [ours[:, :, first : first + width]], *(torch.tensor(x, device=DEVICE) for x in ([30], [5], [0, 1])), impl=impl
    )
    assert torch.equal(ours, expected)


@every_impl
def test_single_moves_copy_whole_pages(impl):
    check([[(3, 10)], [(3, 11)], [(5, 12)]], impl)


def test_arguments_that_do_not_fit_are_named():
    rows, index = tensors(), torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match=r"\[2\], \[1\]"):
        move_rows(rows, index, index[:1], index)
    for bad in ([], rows + rows, [rows[0], rows[1][:, :5]], [rows[0].transpose(1, 2)], [rows[0][0]]):
        with pytest.raises(ValueError, match="one to four"):
            move_rows(bad, index, index, index)
    with pytest.raises(ValueError, match="'cuda'"):
        move_rows(rows, index, index, torch.tensor([0, 2], device=DEVICE), impl="cuda")


@every_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend, impl):
    """Moved and read back inside the compiled function."""

    def move_and_read(rows, sources, targets, cumulative):
        move_rows(rows, sources, targets, cumulative, impl=impl)
        return [r[:, 3].float().sum() for r in rows]

    kinds = ((torch.int32, 8), (torch.int8, 12))
    arguments = [torch.tensor(x, device=DEVICE) for x in ([5, 9], [3, 4], [0, 2])]
    ours, expected = tensors(kinds), tensors(kinds)
    got = torch.compile(move_and_read, backend=backend, fullgraph=True)(ours, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, move_and_read(expected, *arguments), strict=True))
    assert all(
        torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(ours, expected, tensors(kinds), strict=True)
    )


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_a_cache_moves_scales_with_their_numbers(kv_dtype):
    """Commit and fork of a quantised cache: what is read back is what was written, scale and all."""
    cache = PagedKVCache(2, 9, 3, 2, 16, 8, device=DEVICE, kv_dtype=kv_dtype)
    sequence = cache.add()
    cache.append([sequence], [8])
    key, value = (torch.randn(8, 2, dim, generator=torch.Generator().manual_seed(dim)).to(DEVICE) for dim in (16, 8))
    for layer in range(2):
        write_kv(cache, layer, key * (layer + 1), value, torch.tensor(cache.slots(sequence, range(8)), device=DEVICE))
    memory = [t for t in (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales) if t is not None]

    def read(s: int) -> list[Tensor]:
        slots = cache.slots(s, range(cache.length(s)))
        return [t.flatten(1, 2)[:, slots].reshape(2, len(slots), -1).view(torch.uint8) for t in memory]

    whole, twin = read(sequence), cache.fork(sequence)
    cache.commit([sequence], [1], [[0, 2, 5, 6]])
    assert all(torch.equal(now, before[:, [0, 1, 3, 6, 7]]) for now, before in zip(read(sequence), whole, strict=True))
    assert all(torch.equal(now, before) for now, before in zip(read(twin), whole, strict=True))


def test_forks_that_commit_together_do_not_reach_each_other(monkeypatch):
    """Both forks move rows of the page they shared, maybe at once: neither may read what the other writes."""

    def independent(tensors, sources, targets, cumulative):
        segments = list(pairwise(cumulative.tolist()))
        for (a, b), (c, d) in permutations(segments, 2):
            assert not set(targets[a:b].tolist()) & {*sources[c:d].tolist(), *targets[c:d].tolist()}
        checked.append(len(segments))
        move_rows(tensors, sources, targets, cumulative)

    checked = []
    monkeypatch.setattr(attention.kv.cache, "move_rows", independent)
    cache = PagedKVCache(1, 6, 8, 1, 4, device=DEVICE)
    first = cache.add()
    cache.append([first], [8])
    key = torch.arange(8.0, device=DEVICE)[:, None, None].expand(8, 1, 4)
    write_kv(cache, 0, key, key, torch.tensor(cache.slots(first, range(8)), device=DEVICE))
    twin = cache.fork(first)
    cache.commit([first, twin], [0, 0], [[1, 3, 5, 7], [2, 4, 6]])
    for sequence, expected in ((first, [1, 3, 5, 7]), (twin, [2, 4, 6])):
        assert cache.key_slots[0][cache.slots(sequence, range(len(expected))), 0, 0].tolist() == expected
    assert checked == [1, 2], "one page was copied, two paths were moved"
