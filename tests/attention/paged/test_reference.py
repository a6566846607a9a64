"""The reference against an oracle that loops over tokens and heads in float64, and the checks of arguments."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch

from attention import AttentionBatch, PagedKVCache, paged_attention
from attention.paged.batch import build_batch
from tests.attention.problems import (
    BRANCHING,
    CHAIN,
    LATENTS,
    LAYER,
    SEVENTY,
    SINKS,
    WINDOWS,
    Case,
    Problem,
    give_back_fronts,
    make,
    oracle,
)


def check(problem: Problem, batch: AttentionBatch | None = None) -> None:
    """Ours equals the oracle: to 1e-5 in float32, 1e-12 in float64, and in bfloat16 to twice one rounding's error."""
    dtype = problem.query.dtype
    ours, lse = problem.attend(batch, return_lse=True)
    assert ours.dtype == dtype and lse.dtype == torch.float32
    atol, rtol = {
        torch.float32: (1e-5, 0),
        torch.float64: (1e-12, 0),
        torch.bfloat16: (1e-5, torch.finfo(torch.bfloat16).eps),
    }[dtype]
    expected, expected_lse = oracle(problem, return_lse=True)
    for out in (ours, problem.attend(batch)):
        torch.testing.assert_close(out.double(), expected, atol=atol, rtol=rtol)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


ROWS = [
    ((339, 1),),
    ((0, 63),),
    ((0, 113),),
    ((63, 1), (63, 1)),
    ((113, 1), (17, 1)),
    ((339, 1), (1, 17)),
    ((17, 17), (1, 1), (63, 1)),
    ((113, 1), (0, 17), (1, 63), (17, 1)),
]
HEADS = [(2, 2), (6, 2), (16, 2), (8, 1)]
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 128), (80, 64), (96, 48), (128, 64), (256, 80)]


def dealt(values: Sequence, count: int, seed: int) -> list:
    """`count` draws in which each of `values` comes equally often."""
    deck = (list(values) * count)[:count]
    random.Random(seed).shuffle(deck)
    return deck


def cases() -> list:
    """Every combination of window, soft-cap, sinks and tree; the shapes are dealt out over them."""
    features = list(product([None, 1, 7], [None, 3.0], [False, True], [(), CHAIN, BRANCHING, SEVENTY]))
    n = len(features)
    shapes = zip(dealt(ROWS, n, 1), dealt(HEADS, n, 2), dealt(DIMS, n, 3), dealt([1, 4, 16, 64], n, 4), strict=True)
    out = []
    for (window, softcap, sinks, parents), (rows, heads, dims, page_size) in zip(features, shapes, strict=True):
        tree = f"{len(parents)}{'c' * (parents == CHAIN)}"
        name = f"window={window}-cap={softcap}-sinks={sinks}-tree={tree}-heads={heads}-dims={dims}"
        name = f"{name}-page={page_size}-rows={rows}"
        out.append(
            pytest.param(Case(rows, parents, window, softcap, sinks, heads, dims, page_size), id=name.replace(" ", ""))
        )
    return out


@pytest.mark.parametrize("case", [*cases(), *LATENTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_equals_the_oracle(case, dtype):
    check(make(case, dtype))


WHOLE_BATCHES = [
    Case(),
    Case(rows=((113, 1), (1, 1), (17, 1))),
    Case(rows=((63, 1),), heads=(8, 1), window=7),
    Case(rows=((17, 1), (0, 63), (113, 17)), parents=BRANCHING, window=7, page_size=16),
    Case(rows=((1, 1), (63, 1)), parents=SEVENTY, softcap=3.0, sinks=True),
    Case(rows=((0, 17), (0, 17)), sinks=True, page_size=1),
]


@pytest.mark.parametrize("case", WHOLE_BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_pages_equal_the_oracle_over_the_numbers_they_stand_for(kv_dtype, dtype, case):
    """Gathered, and read in place where the pages of one sequence are consecutive."""
    for shuffle in (1, None):
        check(make(replace(case, kv_dtype=kv_dtype), dtype, shuffle))


@pytest.mark.parametrize("case", WHOLE_BATCHES)
def test_the_order_of_pages_changes_no_bit(case):
    in_a_row, scattered = make(case, shuffle=None), make(case, shuffle=2)
    assert [in_a_row.cache.pages(s) for s in in_a_row.sequences] != [
        scattered.cache.pages(s) for s in scattered.sequences
    ]
    assert torch.equal(in_a_row.attend(), scattered.attend())


@pytest.mark.parametrize("case", WHOLE_BATCHES)
def test_memory_that_no_token_owns_changes_no_bit(case):
    """Unused pages, the rest of each last page and the other layer may hold NaN."""
    assert torch.equal(make(case, poison=float("nan")).attend(), make(case, poison=0.0).attend())


@pytest.mark.parametrize("case", SINKS)
def test_no_window_hides_the_first_tokens_of_a_cache_that_says_so(case):
    check(make(case))


@pytest.mark.parametrize("case", [*WINDOWS, *SINKS[:3], SINKS[4]])
def test_pages_before_the_window_may_be_given_back(case):
    problem = make(case)
    expected = problem.attend()
    give_back_fronts(problem)
    assert torch.equal(problem.attend(), expected)


@pytest.mark.parametrize("case", WHOLE_BATCHES)
def test_a_row_does_not_depend_on_the_rest_of_its_batch(case):
    together = make(case).attend().split(case.query_lengths)
    for row, ours in enumerate(together):
        torch.testing.assert_close(ours, make(case, rows=[row]).attend(), atol=1e-6, rtol=0)


def test_all_layers_of_a_forward_share_one_batch():
    """What a batch derives for one layer, window and head count is right for the others."""
    problem = make(Case(rows=((17, 1), (0, 17)), parents=BRANCHING))
    batch = problem.batch()
    for window, softcap in product([None, 7, 1], [None, 3.0]):
        check(replace(problem, case=replace(problem.case, window=window, softcap=softcap)), batch)
    check(replace(problem, case=replace(problem.case, heads=(4, 2)), query=problem.query[:, :4].contiguous()), batch)


def as_plain_causal(batch: AttentionBatch) -> AttentionBatch:
    return replace(batch, tree_bits=None, cu_tree_sizes=None, tree_positions=None)


def with_positions_counted_along_the_tree(batch: AttentionBatch) -> AttentionBatch:
    nodes = int(batch.cu_tree_sizes[1])
    positions, tree_positions = batch.positions.clone(), batch.tree_positions.clone()
    for end, end_of_tree in zip(batch.cu_seqlens_q[1:].tolist(), batch.cu_tree_sizes[1:].tolist(), strict=True):
        counted = positions[end - nodes] + torch.arange(nodes, device=positions.device)
        positions[end - nodes : end] = tree_positions[end_of_tree - nodes : end_of_tree] = counted
    return replace(batch, positions=positions, tree_positions=tree_positions)


def with_siblings_visible(batch: AttentionBatch) -> AttentionBatch:
    last = batch.cu_seqlens_q[1:] - 1
    bits = batch.tree_bits.clone()
    bits[last] |= bits[last - 1]
    return replace(batch, tree_bits=bits)


@pytest.mark.parametrize("plant", [as_plain_causal, with_positions_counted_along_the_tree, with_siblings_visible])
@pytest.mark.parametrize("parents", [BRANCHING, SEVENTY], ids=["5 nodes", "70 nodes"])
def test_a_planted_bug_is_seen(plant: Callable[[AttentionBatch], AttentionBatch], parents):
    """The comparison can fail: each of these mistakes in the mask is far outside the tolerance."""
    problem = make(Case(rows=((17, 1), (63, 17)), parents=parents, window=7))
    check(problem)
    with pytest.raises(AssertionError, match="not close"):
        check(problem, plant(problem.batch()))


def test_impl_none_is_the_reference_on_a_cpu():
    problem = make(Case())
    assert torch.equal(paged_attention(problem.query, LAYER, problem.batch(), problem.scale), problem.attend())


@pytest.mark.parametrize("impl", ["flash", ""])
def test_an_implementation_that_cannot_run_is_refused_by_name(impl):
    problem = make(Case())
    with pytest.raises(ValueError, match=repr(impl)):
        paged_attention(problem.query, LAYER, problem.batch(), problem.scale, impl=impl)


def test_a_query_that_does_not_fit_is_refused_with_its_shape():
    problem = make(Case())  # 6 query heads, 2 kv heads, 19 tokens
    for query in (problem.query[:, :5], problem.query[:-1], problem.query.repeat(2, 1, 1)):
        with pytest.raises(ValueError, match=rf"\[{query.shape[0]}, {query.shape[1]}, 64\].* 19 tokens, 2 kv heads"):
            paged_attention(query, LAYER, problem.batch(), problem.scale)


@pytest.mark.parametrize("counts", [[6], [1], [4, 4], [3, 5]])
def test_the_output_is_contiguous(counts):
    """Some models view it flat."""
    cache = PagedKVCache(1, 8, 4, num_kv_heads=2, head_dim=8)
    cache.key_pages.zero_(), cache.value_pages.zero_()
    sequences = [cache.add() for _ in counts]
    cache.append(sequences, counts)
    out = paged_attention(torch.ones(sum(counts), 4, 8), 0, build_batch(cache, sequences, counts), 1.0)
    assert out.shape == (sum(counts), 4, 8) and out.is_contiguous()
