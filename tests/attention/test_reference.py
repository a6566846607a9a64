"""The reference attention against an oracle that loops over tokens and heads in float64, and the door in front of it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from attention import AttentionBatch, PagedKVCache, paged_attention
from attention.batch import ancestor_bits, build_batch

Parents = tuple[int | None, ...]
CHAIN: Parents = (None, 0, 1, 2, 3)
BRANCHING: Parents = (None, 0, 0, 1, 1)
SEVENTY: Parents = (None, *(random.Random(7).randrange(max(0, node - 6), node) for node in range(1, 70)))
LAYER = 1


@dataclass(frozen=True)
class Case:
    """One paged attention problem. `rows` are (tokens before, new tokens); with a tree, the last new token becomes the tree's root."""

    rows: tuple[tuple[int, int], ...] = ((17, 17), (1, 1), (63, 1))
    parents: Parents = ()
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    heads: tuple[int, int] = (6, 2)  # query heads, kv heads
    dims: tuple[int, int] = (64, 64)  # of keys, of values
    page_size: int = 4

    @property
    def query_lengths(self) -> list[int]:
        return [new + max(0, len(self.parents) - 1) for _, new in self.rows]

    @property
    def lengths(self) -> list[int]:
        return [before + query for (before, _), query in zip(self.rows, self.query_lengths, strict=True)]


def path(parents: Parents, node: int) -> list[int]:
    """The nodes from `node` up to the root."""
    return [node] if parents[node] is None else [node, *path(parents, parents[node])]


@dataclass
class Problem:
    """A case with its contents: random keys, values and queries, all memory that no token owns filled with `poison`."""

    case: Case
    cache: PagedKVCache
    sequences: list[int]
    query: Tensor
    sinks: Tensor | None
    scale: float

    def batch(self) -> AttentionBatch:
        parents = self.case.parents
        tree = ([len(path(parents, n)) - 1 for n in range(len(parents))], ancestor_bits(parents)) if parents else ()
        return build_batch(self.cache, self.sequences, self.case.query_lengths, *tree)

    def attend(self, batch: AttentionBatch | None = None) -> Tensor:
        case = self.case
        return paged_attention(self.query, LAYER, batch or self.batch(), self.scale, case.window, case.softcap, self.sinks, impl="reference")


def make(case: Case, dtype: torch.dtype = torch.float32, shuffle: int | None = 1, poison: float = float("nan"), rows: Sequence[int] | None = None) -> Problem:
    """Contents depend on `case` and `dtype` alone; `shuffle` seeds the order of pages (None: in a row); `rows` picks rows of the batch."""
    (heads, groups), (key_dim, value_dim) = case.heads, case.dims
    generator = torch.Generator().manual_seed(sum(case.lengths))
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    contents = [(normal(n, groups, key_dim), normal(n, groups, value_dim)) for n in case.lengths]
    queries = [normal(n, heads, key_dim) for n in case.query_lengths]
    sinks = normal(heads) if case.sinks else None
    chosen = list(range(len(case.rows))) if rows is None else rows

    pages = sum(-(-n // case.page_size) for n in case.lengths) + 3
    cache = PagedKVCache(2, pages, case.page_size, groups, key_dim, value_dim, dtype=dtype)
    cache.key_pages.fill_(poison)
    cache.value_pages.fill_(poison)
    if shuffle is not None:  # take every page and give them back in a random order
        takers = [cache.add() for _ in range(pages)]
        cache.append(takers, [1] * pages)
        random.Random(shuffle).shuffle(takers)
        for taker in takers:
            cache.free(taker)
    sequences = [cache.add() for _ in chosen]
    for sequence, row in zip(sequences, chosen, strict=True):
        cache.append([sequence], [case.lengths[row]])
        slots = torch.tensor(cache.slots(sequence, range(case.lengths[row])))
        cache.key_slots[LAYER][slots], cache.value_slots[LAYER][slots] = contents[row]
    picked = replace(case, rows=tuple(case.rows[row] for row in chosen))
    return Problem(picked, cache, sequences, torch.cat([queries[row] for row in chosen]), sinks, 0.9 * key_dim**-0.5)


def oracle(problem: Problem) -> Tensor:
    """`[T, H, Dv]` in float64, one token, one head at a time."""
    case, cache = problem.case, problem.cache
    heads, groups = case.heads
    queries, key_slots, value_slots = (x.double().numpy() for x in (problem.query, cache.key_slots[LAYER], cache.value_slots[LAYER]))
    out = []
    for sequence, length, new in zip(problem.sequences, case.lengths, case.query_lengths, strict=True):
        prefix = length - len(case.parents)
        paths = {prefix + node: [prefix + n for n in path(case.parents, node)] for node in range(len(case.parents))}
        position = {index: prefix + len(paths[index]) - 1 if index in paths else index for index in range(length)}
        for index in range(length - new, length):
            sees = [*range(prefix), *paths[index]] if index in paths else [*range(index + 1)]
            if case.window is not None:
                sees = [j for j in sees if position[index] - position[j] < case.window]
            slots = cache.slots(sequence, sees)
            for head in range(heads):
                group = head // (heads // groups)
                scores = problem.scale * (key_slots[slots, group] @ queries[len(out) // heads, head])
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores)
                total = weights.sum() + (np.exp(float(problem.sinks[head])) if case.sinks else 0.0)
                out.append(weights @ value_slots[slots, group] / total)
    return torch.from_numpy(np.stack(out)).view(-1, heads, case.dims[1])


def check(problem: Problem, batch: AttentionBatch | None = None) -> None:
    """Ours equals the oracle: to 1e-5 in float32, 1e-12 in float64, and in bfloat16 as if computed in float32 and rounded once (twice that is let pass)."""
    dtype = problem.query.dtype
    ours = problem.attend(batch)
    assert ours.dtype == dtype
    atol, rtol = {torch.float32: (1e-5, 0), torch.float64: (1e-12, 0), torch.bfloat16: (1e-5, torch.finfo(torch.bfloat16).eps)}[dtype]
    torch.testing.assert_close(ours.double(), oracle(problem), atol=atol, rtol=rtol)


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
        name = f"window={window}-cap={softcap}-sinks={sinks}-tree={tree}-heads={heads}-dims={dims}-page={page_size}-rows={rows}"
        out.append(pytest.param(Case(rows, parents, window, softcap, sinks, heads, dims, page_size), id=name.replace(" ", "")))
    return out


@pytest.mark.parametrize("case", cases())
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
def test_the_order_of_pages_changes_no_bit(case):
    in_a_row, scattered = make(case, shuffle=None), make(case, shuffle=2)
    assert [in_a_row.cache.pages(s) for s in in_a_row.sequences] != [scattered.cache.pages(s) for s in scattered.sequences]
    assert torch.equal(in_a_row.attend(), scattered.attend())


@pytest.mark.parametrize("case", WHOLE_BATCHES)
def test_memory_that_no_token_owns_changes_no_bit(case):
    """Unused pages, the rest of each last page and the other layer may hold NaN."""
    assert torch.equal(make(case, poison=float("nan")).attend(), make(case, poison=0.0).attend())


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
    return replace(batch, tree_bits=None, tree_sizes=None)


def with_positions_counted_along_the_tree(batch: AttentionBatch) -> AttentionBatch:
    nodes = int(batch.tree_sizes[0])
    positions = batch.positions.clone()
    for end in batch.cu_seqlens_q[1:].tolist():
        positions[end - nodes : end] = positions[end - nodes] + torch.arange(nodes)
    return replace(batch, positions=positions)


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


@pytest.mark.parametrize("impl", ["triton", "flash", ""])
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
