"""The Triton kernel against the float64 oracle, in Triton's interpreter on a CPU, at more shapes on a GPU."""

import random
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention import PagedKVCache, paged_attention
from attention.paged import attention_kernel as paged_kernel
from attention.paged import launch_config
from attention.paged.attention_kernel import paged_attention_triton
from attention.paged.batch import ancestor_bits, build_batch
from attention.paged.launch_config import (
    PagedConfig,
    fit,
    head_splits,
    key_tiles,
    padded,
    paged_config,
    tile_bytes,
)
from attention.paged.plan_kernel import split_plan
from attention.paged.reference import _key_slots, _query_index, visible_keys
from specdec import TokenTree
from tests.attention.devices import DEVICE, LOW_PRECISION
from tests.attention.paged.test_reference import (
    as_plain_causal,
    with_positions_counted_along_the_tree,
    with_siblings_visible,
)
from tests.attention.problems import (
    BRANCHING,
    CHAIN,
    LATENTS,
    LAYER,
    LONG_AND_LOW,
    SEVENTY,
    SINKS,
    WINDOWS,
    Case,
    Problem,
    contents,
    give_back_fronts,
    make,
    oracle,
)

HUNDRED_FIFTY = (None, *(random.Random(9).randrange(max(0, node - 9), node) for node in range(1, 150)))
MIXED = Case(rows=((20, 17), (37, 1), (5, 1)), trees=((), BRANCHING, ()), page_size=16)

# every feature crossed with trees, at shapes that the interpreter walks in about a second
SMALL = [
    Case(rows=((63, 1), (17, 1)), heads=(8, 1), page_size=64),
    Case(rows=((17, 1), (1, 1)), parents=CHAIN, heads=(2, 2), dims=(80, 80), page_size=16),
    Case(rows=((0, 17), (40, 3)), heads=(14, 2), window=7, dims=(96, 96)),
    Case(rows=((30, 1), (0, 1)), parents=BRANCHING, window=3, page_size=1),
    Case(rows=((113, 1),), parents=BRANCHING, softcap=3.0, page_size=64, dims=(128, 128)),
    Case(rows=((63, 1), (0, 5)), sinks=True, softcap=3.0, dims=(64, 128)),
    Case(rows=((33, 1),), parents=SEVENTY, heads=(2, 1), page_size=64),
    Case(rows=((33, 1),), parents=SEVENTY, heads=(2, 1), window=20, sinks=True, page_size=24),
    Case(rows=((3, 1),), parents=HUNDRED_FIFTY, heads=(1, 1), page_size=128),
    MIXED,
    replace(MIXED, window=9, softcap=3.0, sinks=True),
    replace(MIXED, trees=((), SEVENTY, BRANCHING), heads=(2, 1), page_size=256),
    replace(MIXED, kv_dtype="int8", page_size=64),
    replace(MIXED, kv_dtype="fp8", window=9, sinks=True),
    Case(rows=((17, 1),), heads=(16, 1), dims=(256, 256), page_size=16),
]


# head dims from 16 to 576, keys and values that differ, keys in two tiles, groups that are split
WIDE = [
    Case(rows=((17, 1),), heads=(16, 1), dims=(576, 512), page_size=16),
    Case(rows=((17, 3), (3, 1)), parents=BRANCHING, heads=(4, 2), dims=(512, 512), page_size=64),
    Case(rows=((17, 1), (5, 1)), heads=(40, 1), dims=(288, 256), page_size=16),
    Case(rows=((17, 3),), heads=(4, 2), dims=(300, 20), page_size=16, window=7, sinks=True, softcap=3.0),
    Case(rows=((17, 3),), heads=(2, 2), dims=(16, 576), page_size=16),
    Case(rows=((17, 3),), dims=(100, 36), page_size=16),
    Case(rows=((17, 3),), heads=(2, 2), dims=(576, 576), page_size=16, kv_dtype="int8"),
    *LATENTS,
    Case(rows=((5, 1), (150, 1)), heads=(24, 1), dims=(272, 400), page_size=16, kv_dtype="fp8"),
]


@pytest.mark.covering(cases=5)
@pytest.mark.parametrize("index", range(len(WIDE)))
def test_head_dims_that_are_wide_or_odd_equal_the_oracle(index):
    for dtype in (torch.float32, *LOW_PRECISION):
        check(make(WIDE[index], dtype, device=DEVICE))


@pytest.mark.parametrize(("room", "sizes"), [(232448, (2, 4)), (166912, (2, 4)), (101376, (2,))])
@pytest.mark.parametrize("dims", [(512, 512), (576, 512), (288, 256)])
def test_tiles_of_wide_heads_fit_into_shared_memory(room, sizes, dims, monkeypatch):
    """Of an H200, an A100 and a GPU for desktops."""
    monkeypatch.setattr(launch_config, "shared_memory", lambda device: room - 2048)
    device = torch.device("cpu")
    for size, heads, queries in product(sizes, (1, 20, 64, 128), (1, 8)):
        _, main, rest = key_tiles(dims[0], False)
        tile = main + rest, padded(dims[1], False), size, size
        of_part = heads // head_splits(heads, max(dims), tile, device)
        config = fit(paged_config(queries * of_part, max(dims), size, 128), tile, device)
        assert config.block_m >= padded(of_part, False) or of_part == 1
        assert tile_bytes(config, *tile) <= room - 2048


def in_same_dtype(problem: Problem) -> Tensor:
    """`[T, H, Dv]` by plain PyTorch in the dtype of the query: the yardstick for our error."""
    case, batch, dtype = problem.case, problem.batch(), problem.query.dtype
    index = _query_index(batch)
    slots = _key_slots(batch)
    slots = torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots.cpu()
    repeats = case.heads[0] // case.heads[1]
    keys, values = (
        torch.from_numpy(contents(problem.cache, name))[slots].to(problem.query) for name in ("key", "value")
    )
    k, v = (x.unflatten(0, (len(case.rows), -1)).transpose(1, 2).repeat_interleave(repeats, 1) for x in (keys, values))
    q = problem.query[index].transpose(1, 2)
    scores = (q @ k.transpose(2, 3)) * problem.scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    visible = visible_keys(batch, case.window, 1)
    scores = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    if case.sinks:
        scores = torch.cat([scores, problem.sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    out = (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)
    return torch.cat([row[-n:] for row, n in zip(out, case.query_lengths, strict=True)])


def check(problem: Problem, batch=None, result: tuple[Tensor, Tensor] | None = None) -> None:
    """At most twice PyTorch's error in the same dtype, and the log of the sum to float32's accuracy.

    result: what the kernel gave (None: it is run)."""
    ours, lse = result or problem.attend(batch, impl="triton", return_lse=True)
    expected, expected_lse = oracle(problem, return_lse=True)
    assert ours.dtype == problem.query.dtype and lse.dtype == torch.float32 and ours.is_contiguous()
    error, yardstick = ((x.cpu().double() - expected).abs().max() for x in (ours, in_same_dtype(problem)))
    assert float(error) <= max(2 * float(yardstick), 1e-6), (
        f"error {float(error):.2e}, PyTorch in {ours.dtype} {float(yardstick):.2e}"
    )
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=2e-5, rtol=0)


@pytest.mark.covering(cases=7)
@pytest.mark.parametrize("index", range(len(SMALL)))
def test_equals_the_oracle(index):
    for dtype in (torch.float32, *(LOW_PRECISION if DEVICE == "cuda" or index % 4 == 0 else ())):
        check(make(SMALL[index], dtype, device=DEVICE))


def every_combination() -> list[Case]:
    """Window x soft-cap x sinks x trees; head counts, head dims, page sizes, 8-bit pages and rows vary with them."""
    rows = [
        ((339, 1), (1, 17)),
        ((0, 113), (63, 1), (17, 1)),
        ((1025, 1),),
        ((113, 1), (0, 17), (1, 63), (17, 1)),
        ((2047, 3), (64, 64), (5, 1)),
    ]
    heads, dims = (
        [(2, 2), (7, 1), (6, 2), (32, 8), (16, 1), (14, 2), (9, 3)],
        [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (96, 48)],
    )
    pages, quantised = [1, 16, 24, 64, 128, 256], [None, None, "int8", "fp8"]
    draw, out = random.Random(5), []
    trees = [(), CHAIN, BRANCHING, SEVENTY, HUNDRED_FIFTY]
    for window, softcap, sinks, parents in product([None, 1, 40], [None, 3.0], [False, True], [*trees, "mixed"]):
        some = draw.choice(rows)
        each = tuple(draw.choice(trees) for _ in some) if parents == "mixed" else ()
        shape = dict(
            heads=draw.choice(heads),
            dims=draw.choice(dims),
            page_size=draw.choice(pages),
            kv_dtype=draw.choice(quantised),
        )
        out.append(Case(some, () if parents == "mixed" else parents, window, softcap, sinks, trees=each, **shape))
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(every_combination())))
def test_every_combination_equals_the_oracle(index):
    dtype = [torch.float16, torch.bfloat16, torch.float32, torch.bfloat16][index % 4]
    check(make(every_combination()[index], dtype, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tree", [(), BRANCHING, HUNDRED_FIFTY], ids=len)
def test_every_head_dim_and_dtype(dim, dtype, tree):
    for rows, page_size in product([((339, 1), (17, 1)), ((63, 6), (1, 17))], [1, 16, 64, 256]):
        check(make(Case(rows, tree, dims=(dim, dim), heads=(8, 2), page_size=page_size), dtype, device=DEVICE))


WHOLE_BATCHES = [
    MIXED,
    replace(MIXED, window=9),
    replace(MIXED, kv_dtype="int8", page_size=64),
    Case(rows=((70, 1), (9, 1)), heads=(4, 2), page_size=1),
]


@cache
def result_of(case):
    """Output and log of the sum, with pages in a random order, and NaN where no token lies."""
    return make(case, device=DEVICE).attend(impl="triton", return_lse=True)


def output_of(case):
    return result_of(case)[0]


@pytest.mark.parametrize("case", WHOLE_BATCHES, ids=["mixed", "window", "int8", "page 1"])
def test_the_order_of_pages_changes_no_bit(case):
    in_a_row, scattered = make(case, shuffle=None, device=DEVICE), make(case, device=DEVICE)
    assert [in_a_row.cache.pages(s) for s in in_a_row.sequences] != [
        scattered.cache.pages(s) for s in scattered.sequences
    ]
    assert torch.equal(in_a_row.attend(impl="triton"), output_of(case))


@pytest.mark.parametrize("case", WHOLE_BATCHES, ids=["mixed", "window", "int8", "page 1"])
def test_memory_that_no_token_owns_changes_no_bit(case):
    assert torch.equal(output_of(case), make(case, poison=0.0, device=DEVICE).attend(impl="triton"))


@pytest.mark.parametrize("case", SINKS)
def test_no_window_hides_the_first_tokens_of_a_cache_that_says_so(case):
    check(make(case, device=DEVICE), result=result_of(case))


@pytest.mark.covering(cases=4)
@pytest.mark.parametrize("case", [*WINDOWS, *SINKS[:3], SINKS[4]])
def test_pages_before_the_window_may_be_given_back(case):
    problem = make(case, device=DEVICE)
    give_back_fronts(problem)
    assert torch.equal(problem.attend(impl="triton"), output_of(case))


@pytest.mark.parametrize("case", WHOLE_BATCHES, ids=["mixed", "window", "int8", "page 1"])
def test_a_row_does_not_depend_on_the_rest_of_its_batch(case):
    """Apart from rounding: how keys are split depends on how much work the whole batch is."""
    together = output_of(case).split(case.query_lengths)
    for row, ours in enumerate(together):
        torch.testing.assert_close(ours, make(case, rows=[row], device=DEVICE).attend(impl="triton"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("plant", [as_plain_causal, with_positions_counted_along_the_tree, with_siblings_visible])
def test_a_planted_bug_is_seen(plant):
    problem = make(Case(rows=((17, 1), (40, 2)), parents=BRANCHING, window=7), device=DEVICE)
    check(problem)
    with pytest.raises(AssertionError, match="error"):
        check(problem, plant(problem.batch()))


@pytest.mark.parametrize(("impl", "window", "last"), [
    *product(["reference"], [None, 4, 20], [1, 2, 5]),
    *(("triton", *one) for one in ((None, 1), (None, 2), (4, 1), (4, 2), (20, 5))),
])  # fmt: skip
def test_the_last_nodes_of_a_tree_alone_give_what_they_give_with_the_others(impl, window, last):
    """The nodes before them are in the cache: a draft model runs its tree level by level. Of five nodes 5 are all."""
    problem = make(Case(rows=((30, 1), (3, 1)), parents=BRANCHING, window=window), device=DEVICE)
    whole = problem.attend(impl=impl).reshape(2, 5, -1)
    trees = [([0, 1, 1, 2, 2], ancestor_bits(BRANCHING))] * 2
    batch = build_batch(problem.cache, problem.sequences, [last, last], trees)
    alone = replace(
        problem, query=problem.query.view(2, 5, *problem.query.shape[1:])[:, 5 - last :].flatten(0, 1)
    ).attend(batch, impl=impl)
    torch.testing.assert_close(alone.reshape(2, last, -1), whole[:, 5 - last :], atol=2e-6, rtol=0)


# the last level of (3, 3, 3) and of (4, 3, 3), the three after a chain of 70 and the chain's end; many and few queries
LEVELS = {
    "(3, 3, 3)": (TokenTree.from_widths((3, 3, 3)).parents, 27),
    "(4, 3, 3)": (TokenTree.from_widths((4, 3, 3)).parents, 36),
    "long and low": (LONG_AND_LOW, 4),
    "the low alone": (LONG_AND_LOW, 3),
}


@pytest.mark.covering
@pytest.mark.parametrize("window", [8, 24, None])
@pytest.mark.parametrize("level", LEVELS)
def test_the_last_level_of_a_tree_sees_as_far_back_as_its_positions_say(level, window):
    """A node's index may be far above its position, from which the window counts back.

    Pages are in any order, and unused ones hold NaN."""
    parents, last = LEVELS[level]
    case = Case(
        rows=((70, 1), (5, 1), (40, 1)), trees=(parents, (), parents), window=window, heads=(2, 1), dims=(16, 16),
        page_size=16, last=last,
    )  # fmt: skip
    check(make(case, device=DEVICE))


@pytest.mark.parametrize("window", [40, 200])
def test_parts_of_a_long_text_before_the_last_level_of_a_tree_lose_no_key(window, poisoned_scratch):
    """Keys from the first that any node sees are split: both kernels must compute the same parts."""
    case = Case(
        rows=((700, 1), (90, 1)), parents=LONG_AND_LOW, window=window, heads=(2, 1), dims=(16, 16), page_size=16, last=4
    )
    problem = make(case, device=DEVICE)
    out, lse = attend_with(problem, PagedConfig(16, 16, 4, 1, 4))
    expected, expected_lse = oracle(problem, return_lse=True)
    torch.testing.assert_close(out.cpu().double(), expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("before", "block_m"), [(300, 64), (1200, 128)])
def test_a_tree_over_a_short_text_takes_smaller_tiles(before, block_m, monkeypatch):
    picked = []
    monkeypatch.setattr(paged_kernel, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(paged_kernel, "paged_config", lambda *given: picked.append(paged_config(*given)) or picked[-1])
    check(make(Case(((before, 1),), SEVENTY, heads=(2, 1), page_size=128), torch.float16, device=DEVICE))
    assert {config.block_m for config in picked} == {block_m}


@pytest.fixture
def poisoned_scratch():
    """`torch.empty` is filled with NaN: what a kernel reads it must have written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def attend_with(problem: Problem, config: PagedConfig) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the kernel with tiles of our choice."""
    cache, batch = problem.cache, problem.batch()
    scales = (None, None) if cache.key_scales is None else (cache.key_scales[LAYER], cache.value_scales[LAYER])
    return paged_attention_triton(
        problem.query, cache.key_pages[LAYER], cache.value_pages[LAYER], *scales, batch.block_tables, batch.kv_lengths,
        batch.cu_seqlens_q, batch.positions, batch.tree_bits, batch.cu_tree_sizes, batch.tree_positions, problem.sinks,
        batch.max_query_length, problem.scale, problem.case.window, cache.sinks, problem.case.softcap, True, config,
    )  # fmt: skip


def parts(case: Case, config: PagedConfig) -> list[int]:
    """The number of parts of each row's keys on a CPU, which counts as four processors; no window."""
    block_q, programs = config.block_m // (case.heads[0] // case.heads[1]), 4 * config.programs_per_sm // case.heads[1]
    tiles = [
        (-(-new // block_q), -(-length // config.block_n))
        for new, length in zip(case.query_lengths, case.lengths, strict=True)
    ]
    share = max(-(-sum(q * k for q, k in tiles) // programs), 128 // config.block_n)
    return [-(-k // share) for _, k in tiles]


SPLIT = [
    (Case(((1401, 1), (17, 1), (530, 1)), heads=(12, 1), page_size=128), 4),
    (Case(((1490, 2), (1, 1)), BRANCHING, heads=(4, 1), page_size=64, sinks=True), 5),
    (Case(((700, 1), (640, 9)), CHAIN, heads=(2, 1), page_size=24, kv_dtype="int8"), 3),
    (Case(((900, 1), (20, 1), (300, 20)), heads=(7, 1), page_size=100, window=600, softcap=3.0), 4),
    (Case(((900, 1), (20, 1), (300, 20)), heads=(7, 1), page_size=100, window=600, first=70), 4),
]


@pytest.mark.covering(cases=2)
@pytest.mark.parametrize(("case", "programs_per_sm"), SPLIT, ids=["plain", "tree, sinks", "int8", "window", "first"])
def test_split_sequences_lose_no_key_and_count_none_twice(case, programs_per_sm, poisoned_scratch):
    config = PagedConfig(16, 64, 4, 1, programs_per_sm)
    if DEVICE == "cpu" and case.window is None:
        assert max(parts(case, config)) > (8 if case.page_size == 128 else 2), "this case is here to be split"
    problem = make(case, device=DEVICE)
    problem = replace(problem, query=4 * problem.query)  # so that parts weigh differently
    out, lse = attend_with(problem, config)
    expected, expected_lse = oracle(problem, return_lse=True)
    torch.testing.assert_close(out.cpu().double(), expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=2e-5, rtol=0)


@pytest.mark.thorough
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 8),
    st.sampled_from([(), BRANCHING]),
)
def test_every_split_plan_gives_the_same_result(rows, programs_per_sm, parents):
    """Whatever the lengths and however many programs are planned for."""
    problem = make(Case(tuple(rows), parents, heads=(2, 1), page_size=64), device=DEVICE)
    out, lse = attend_with(problem, PagedConfig(16, 64, 4, 1, programs_per_sm))
    expected, expected_lse = problem.attend(return_lse=True)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=0)


@triton.jit
def plan_kernel(lengths, cu_seqlens_q, out, B, programs,
                BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr, WAVES: tl.constexpr,
                B_PAD: tl.constexpr):  # fmt: skip
    query_tiles, num_parts = split_plan(
        lengths, cu_seqlens_q, None, B, programs, None, BLOCK_Q, BLOCK_N, MIN_TILES, WAVES, B_PAD
    )
    tl.store(out + tl.arange(0, B_PAD), query_tiles)
    tl.store(out + B_PAD + tl.arange(0, B_PAD), num_parts)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20)), min_size=1, max_size=7),
    st.integers(1, 300),
    st.sampled_from([1, 8, 32]),
    st.integers(1, 3),
)
@example([(1 << 17, 1 << 17)] * 2, 132, 1, 1)  # 2^34 tile pairs
@example([(1 << 20, 1 << 20)], 16, 1, 2)
@example([(4096, 1)] * 20, 16, 4, 2)  # one and a quarter waves unsplit
def test_a_plan_keeps_the_bounds_that_scratch_memory_relies_on(rows, programs, block_q, waves):
    lengths, new = zip(*((max(row), min(row)) for row in rows), strict=True)
    size = 1 << (len(rows) - 1).bit_length()
    out = torch.zeros(2, size, dtype=torch.int64, device=DEVICE)
    cumulative = torch.tensor([0, *new], device=DEVICE).cumsum(0)
    plan_kernel[(1,)](
        torch.tensor(lengths, device=DEVICE), cumulative, out, len(rows), programs, BLOCK_Q=block_q, BLOCK_N=64,
        MIN_TILES=2, WAVES=waves, B_PAD=size,
    )  # fmt: skip
    tiles, num_parts = (x[: len(rows)].tolist() for x in out)
    assert tiles == [-(-n // block_q) for n in new]
    assert all(1 <= p <= max(1, -(-n // 64)) for p, n in zip(num_parts, lengths, strict=True) if n)
    split = [(t, p) for t, p in zip(tiles, num_parts, strict=True) if p > 1]
    assert sum(t for t, _ in split) <= waves * programs and sum(t * p for t, p in split) <= 2 * waves * programs
    assert sum(t * p for t, p in zip(tiles, num_parts, strict=True)) <= waves * programs + sum(tiles)


def test_a_plan_avoids_a_wave_of_mostly_idle_programs():
    """20 sequences for 16 programs: unsplit, the second wave would run 4."""
    out = torch.zeros(2, 32, dtype=torch.int64, device=DEVICE)
    lengths, cumulative = torch.full((20,), 4096, device=DEVICE), torch.arange(21, device=DEVICE)
    for waves, wanted in ((1, 1), (2, 2)):
        plan_kernel[(1,)](lengths, cumulative, out, 20, 16, BLOCK_Q=4, BLOCK_N=128, MIN_TILES=1, WAVES=waves, B_PAD=32)
        assert out[1, :20].tolist() == [wanted] * 20


def test_a_query_may_be_a_view_with_strides_of_its_own():
    """The adapter passes [H, T, D] transposed."""
    problem = make(MIXED, device=DEVICE)
    strided = problem.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(problem.attend(impl="triton"), replace(problem, query=strided).attend(impl="triton"))


def flat_arguments(problem: Problem) -> tuple:
    """What the custom op takes."""
    batch, cache = problem.batch(), problem.cache
    scales = (None, None) if cache.key_scales is None else (cache.key_scales[LAYER], cache.value_scales[LAYER])
    return (
        problem.query, cache.key_pages[LAYER], cache.value_pages[LAYER], *scales, batch.block_tables, batch.kv_lengths,
        batch.cu_seqlens_q, batch.positions, batch.tree_bits, batch.cu_tree_sizes, batch.tree_positions, problem.sinks,
        batch.max_query_length, problem.scale, None, 0, None, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [Case(((5, 1), (3, 2)), page_size=16), Case(((5, 1),), BRANCHING, sinks=True, page_size=16, kv_dtype="int8")],
    ids=["plain", "tree"],
)
def test_the_custom_op_keeps_its_promises(case):
    """Schema, aliasing, dispatch and the fake implementation, by PyTorch's own checker."""
    torch.library.opcheck(torch.ops.specdec.paged_attention, flat_arguments(make(case, poison=0.0, device=DEVICE)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_takes_it_without_a_graph_break(backend):
    problem = make(Case(rows=((5, 1), (3, 2)), page_size=16, heads=(2, 1)), device=DEVICE)
    batch = problem.batch()

    def step(query):
        return 2 * paged_attention(query * 1.0, LAYER, batch, problem.scale, impl="triton")

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(problem.query), 2 * problem.attend(impl="triton"))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_other_lengths():
    """The grid depends on shapes alone: lengths, tables and tree words may change between replays."""
    long, short = (
        make(
            Case(((before, 1), (before // 3, 1)), BRANCHING, page_size=64, heads=(8, 2)), torch.bfloat16, device=DEVICE
        )
        for before in (900, 60)
    )
    static = list(flat_arguments(long))
    static[5] = static[5].clone()
    out, _ = torch.ops.specdec.paged_attention(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = torch.ops.specdec.paged_attention(*static)
    graph.replay()
    torch.testing.assert_close(out, torch.ops.specdec.paged_attention(*flat_arguments(long))[0])
    other = flat_arguments(short)
    pages = other[1].shape[0]
    static[1][:pages], static[2][:pages] = other[1], other[2]
    static[5].zero_()
    static[5][:, : other[5].shape[1]] = other[5]
    for index in (0, 6, 8):
        static[index].copy_(other[index])
    graph.replay()
    torch.testing.assert_close(out, torch.ops.specdec.paged_attention(*other)[0], atol=4e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_cache_too_large_for_32_bit_offsets(kv_dtype):
    """The last pages are beyond 2^31 elements; equal contents in the first pages give equal bits."""
    groups, dim, size = 8, 128, 64
    pages = 2**31 // (groups * dim * size) + 8
    cache = PagedKVCache(1, pages, size, groups, dim, dtype=torch.bfloat16, device=DEVICE, kv_dtype=kv_dtype)
    if kv_dtype:
        cache.key_scales.fill_(0.01), cache.value_scales.fill_(0.01)
    sequences = [cache.add(), cache.add(), cache.add()]
    cache.append(sequences, [4 * size, (pages - 8) * size, 4 * size])
    ends = [list(cache.pages(sequences[i])) for i in (0, 2)]
    assert min(ends[1]) * size * groups * dim >= 2**31 > max(ends[0]) * size * groups * dim
    for memory in (cache.key_pages, cache.value_pages):
        memory[0, ends[0]] = (
            torch.randn(memory[0, ends[0]].shape, device=DEVICE).mul(20 if kv_dtype else 1).to(memory.dtype)
        )
        memory[0, ends[1]] = memory[0, ends[0]]
    query = torch.randn(5, 32, dim, dtype=torch.bfloat16, device=DEVICE)
    first, last = (
        paged_attention(query, 0, build_batch(cache, [sequences[i]], [5]), dim**-0.5, impl="triton") for i in (0, 2)
    )
    assert torch.equal(first, last) and bool(first.isfinite().all())


def test_triton_that_cannot_run_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = make(Case())
    with pytest.raises(ValueError, match="impl='triton' cannot run.* device cpu"):
        problem.attend(impl="triton")


def test_what_the_kernel_cannot_do_is_refused_by_name():
    problem = make(Case(rows=((5, 1),), page_size=16), torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        problem.attend(impl="triton")
    wide = make(Case(rows=((5, 1),), dims=(640, 640), heads=(1, 1), page_size=16), device=DEVICE)
    with pytest.raises(ValueError, match="head dims up to 576.*640"):
        wide.attend(impl="triton")
    odd = make(Case(rows=((5, 1),), dims=(64, 63), page_size=16, kv_dtype="int8"), device=DEVICE)
    with pytest.raises(ValueError, match="even value head dim, got 63"):
        odd.attend(impl="triton")
    trained = make(Case(rows=((5, 1),), page_size=16), device=DEVICE)
    trained.query.requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        trained.attend(impl="triton")
    with torch.no_grad():
        trained.attend(impl="triton")


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_outside_the_cache_is_refused(layer):
    problem = make(Case(rows=((5, 1),)), device=DEVICE)
    with pytest.raises(ValueError, match=f"layer below 2.* {layer}$"):
        paged_attention(problem.query, layer, problem.batch(), problem.scale)
