"""Forwards described on the device, with lengths that the host does not know, against those described on the host."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from attention import PagedKVCache
from attention.dispatch import triton_available
from attention.paged.batch import TENSORS, ancestor_bits, build_batch
from attention.paged.device_batch import DeviceSequences, moves_of, place_nodes
from tests.attention.devices import DEVICE
from tests.attention.problems import Case, make

needs_triton = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
whole = lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=DEVICE)
PARENTS, DEPTHS = (None, 0, 0, 1, 3), (0, 1, 1, 2, 3)


def tree_on_device(rows: int) -> tuple[Tensor, Tensor]:
    """Depths `[rows, M]` and ancestor bits `[rows, M, W]`."""
    bits = torch.tensor(ancestor_bits(PARENTS), device=DEVICE)
    return torch.tensor(DEPTHS, device=DEVICE).expand(rows, -1), bits.expand(rows, -1, -1)


@pytest.mark.covering
@pytest.mark.parametrize("own_trees", [False, True], ids=["one tree", "a tree each"])
@pytest.mark.parametrize("last", [1, 2, 5])
def test_the_last_nodes_of_a_tree_are_described_as_on_the_host(last, own_trees):
    """Also the last one alone, whose ancestor bits are a view of the whole tree's, and attended to by the kernel."""
    problem = make(Case(rows=((30, 1), (5, 1), (11, 1)), parents=PARENTS), device=DEVICE)
    lengths = [problem.cache.length(sequence) for sequence in problem.sequences]
    rows = DeviceSequences(problem.cache, max(lengths), torch.ones(3, dtype=torch.bool, device=DEVICE))
    rows.load(problem.sequences, [length - last for length in lengths])
    depths, bits = tree_on_device(3 if own_trees else 1)
    found = rows.append(last, (depths.contiguous(), bits.contiguous()) if own_trees else (depths, bits))
    expected = build_batch(problem.cache, problem.sequences, [last] * 3, [(DEPTHS, ancestor_bits(PARENTS))] * 3)
    for name in TENSORS[1:]:
        assert getattr(found, name).equal(getattr(expected, name)) and getattr(found, name).is_contiguous(), name
    few = replace(problem, query=problem.query.view(3, 5, *problem.query.shape[1:])[:, 5 - last :].flatten(0, 1))
    for impl in ("reference", "triton"):
        torch.testing.assert_close(few.attend(found, impl=impl), few.attend(expected, impl=impl), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", TENSORS)
def test_a_batch_says_which_tensor_is_not_contiguous(name):
    problem = make(Case(rows=((9, 2), (9, 2)), parents=PARENTS), device=DEVICE)
    batch = problem.batch()
    assert name in {one.name for one in fields(batch)}
    with pytest.raises(ValueError, match=f"{name} must be contiguous"):
        replace(batch, **{name: torch.stack([getattr(batch, name)] * 2, -1)[..., 0]})


def test_block_tables_follow_sequences_that_grow_at_the_end_and_lose_their_front():
    """In place: every row reads what a table written anew would read, the others stay."""
    cache = PagedKVCache(num_layers=1, num_pages=12, page_size=4, num_kv_heads=1, head_dim=8)
    first, second = cache.add(), cache.add()
    rows = DeviceSequences(cache, capacity=24, alive=torch.ones(3, dtype=torch.bool))
    for counts, committed in (((9, 5), 0), ((4, 4), 11), ((0, 6), 13), ((8, 0), 13), ((3, 0), 24)):
        cache.append([first, second], list(counts))
        cache.free_front(first, committed, window=3)
        rows.follow([2, 0], [first, second])
        anew = DeviceSequences(cache, capacity=24, alive=torch.ones(3, dtype=torch.bool))
        anew.follow([2, 0], [first, second])
        for row, sequence in ((2, first), (0, second)):
            places = cache.pages_for(cache.length(sequence))
            assert rows.block_tables[row, :places].tolist() == list(cache.pages(sequence))
            assert torch.equal(rows.block_tables[row, :places], anew.block_tables[row, :places])
            assert torch.equal(rows._slots[row, : 4 * places], anew._slots[row, : 4 * places])
    assert cache.table.freed_pages(first) == 5 and not rows.block_tables[1].any()


@needs_triton
@pytest.mark.parametrize(("rows", "nodes", "last"), [(1, 61, 61), (1, 9, 4), (3, 70, 1), (3, 130, 67)])
@pytest.mark.parametrize("own_trees", [False, True], ids=["one tree", "a tree each"])
def test_the_nodes_of_trees_find_their_places_in_one_launch(rows, nodes, last, own_trees):
    """Also of rows that have ended, or begin before position 0; bits of several words, given as views."""
    generator, found = torch.Generator().manual_seed(nodes), []
    given, words = rows if own_trees else 1, -(-nodes // 64)
    number = lambda most, *shape: torch.randint(most, shape, generator=generator).to(DEVICE)
    depths, bits = number(9, given, nodes), number(1 << 62, given, nodes, 2 * words)[..., ::2]
    table = number(10_000, rows, 300)
    for impl in ("reference", "triton"):
        lengths, alive = whole(*(150, 40, -3)[:rows]), whole(*(1, 0, 1)[:rows], dtype=torch.bool)
        found.append((*place_nodes(lengths, alive, table, last, depths, bits, impl), lengths))
    for expected, mine in zip(*found, strict=True):
        assert mine.equal(expected) and mine.is_contiguous()


@needs_triton
@pytest.mark.parametrize("depth", [0, 1, 6, 9])
def test_what_a_commit_moves_is_found_in_one_launch(depth):
    """Paths of every length, which begin with tokens that stay, in rows of which one has ended."""
    generator = torch.Generator().manual_seed(depth)
    table = torch.randperm(4 * 40, generator=generator).view(4, 40).to(DEVICE)
    path = torch.stack([torch.randperm(20, generator=generator)[:depth].sort().values + 1 for _ in range(4)]).to(DEVICE)
    path[:2, : depth // 2] = torch.arange(1, depth // 2 + 1)
    wide = torch.stack([path, path], 1)[:, 0]
    given = whole(3, 0, 30, 12), wide, whole(depth, min(depth, 2), 0, depth), whole(1, 1, 1, 0, dtype=torch.bool), table
    expected, found = (moves_of(*given, impl) for impl in ("reference", "triton"))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.equal(theirs)
    assert bool((expected[0] >= 0).any()) == (depth > 0)
