"""Paged attention problems with random contents, and an oracle that loops over tokens and heads in float64."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attention import AttentionBatch, PagedKVCache, paged_attention
from attention.kv.quantization import dequantise, quantise
from attention.kv.window import KeyWindow
from attention.paged.batch import ancestor_bits, build_batch

Parents = tuple[int | None, ...]
CHAIN: Parents = (None, 0, 1, 2, 3)
BRANCHING: Parents = (None, 0, 0, 1, 1)
LONG_AND_LOW: Parents = (None, *range(69), 0, 0, 0)  # a chain of 70, then three more children of the root
SEVENTY: Parents = (None, *(random.Random(7).randrange(max(0, node - 6), node) for node in range(1, 70)))
LAYER = 1


@dataclass(frozen=True)
class Case:
    """One paged attention problem.

    `rows` are (tokens before, new tokens); where a row has a tree, its last new token is the root. `trees` are the
    trees of the rows; without it all have `parents`. With `last` only so many of each row's tokens
    are queries: the rest is in the cache, as where a draft model runs its tree level by level."""

    rows: tuple[tuple[int, int], ...] = ((17, 17), (1, 1), (63, 1))
    parents: Parents = ()
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    heads: tuple[int, int] = (6, 2)  # query heads, kv heads
    dims: tuple[int, int] = (64, 64)  # of keys, of values
    page_size: int = 4
    trees: tuple[Parents, ...] = ()
    kv_dtype: str | None = None
    last: int | None = None
    first: int = 0  # tokens that the window, which is the cache's then, does not hide
    in_keys: bool = False  # values are the first numbers of the keys

    @property
    def row_trees(self) -> tuple[Parents, ...]:
        return self.trees or (self.parents,) * len(self.rows)

    @property
    def query_lengths(self) -> list[int]:
        whole = [new + max(0, len(tree) - 1) for (_, new), tree in zip(self.rows, self.row_trees, strict=True)]
        return whole if self.last is None else [min(self.last, queries) for queries in whole]

    @property
    def lengths(self) -> list[int]:
        return [
            before + new + max(0, len(tree) - 1) for (before, new), tree in zip(self.rows, self.row_trees, strict=True)
        ]


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
        trees = [
            ([len(path(tree, n)) - 1 for n in range(len(tree))], ancestor_bits(tree)) if tree else None
            for tree in self.case.row_trees
        ]
        return build_batch(self.cache, self.sequences, self.case.query_lengths, trees)

    def attend(self, batch: AttentionBatch | None = None, impl: str = "reference", return_lse: bool = False):
        case = self.case
        return paged_attention(
            self.query, LAYER, batch or self.batch(), self.scale, case.window, case.softcap, self.sinks, return_lse,
            impl=impl,
        )  # fmt: skip


def make(
    case: Case,
    dtype: torch.dtype = torch.float32,
    shuffle: int | None = 1,
    poison: float = float("nan"),
    rows: Sequence[int] | None = None,
    device: str = "cpu",
) -> Problem:
    """The problem of a case, whose contents depend on `case` and `dtype` alone.

    `shuffle` seeds the order of pages (None: consecutive); `rows` picks rows of the batch."""
    (heads, groups), (key_dim, value_dim) = case.heads, case.dims
    generator = torch.Generator().manual_seed(sum(case.lengths))
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    contents = [(normal(n, groups, key_dim), normal(n, groups, value_dim)) for n in case.lengths]
    queries = [normal(n, heads, key_dim) for n in case.query_lengths]
    sinks = normal(heads).to(device) if case.sinks else None
    chosen = list(range(len(case.rows))) if rows is None else rows

    pages = sum(-(-n // case.page_size) for n in case.lengths) + 3
    cache = PagedKVCache(
        2, pages, case.page_size, groups, key_dim, value_dim, dtype=dtype, device=device, kv_dtype=case.kv_dtype,
        sees=KeyWindow.of(case.window, case.first) if case.first else None, values_in_keys=case.in_keys,
    )  # fmt: skip
    for memory in (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales):
        if memory is not None and memory.dtype != torch.int8:
            memory.copy_(torch.full((), poison))
    if shuffle is not None:  # take every page and give them back in a random order
        takers = [cache.add() for _ in range(pages)]
        cache.append(takers, [1] * pages)
        random.Random(shuffle).shuffle(takers)
        for taker in takers:
            cache.free(taker)
    sequences = [cache.add() for _ in chosen]
    for sequence, row in zip(sequences, chosen, strict=True):
        cache.append([sequence], [case.lengths[row]])
        slots = torch.tensor(cache.slots(sequence, range(case.lengths[row])), device=device)
        for content, name in zip(contents[row], ("key", "value"), strict=True):
            if name == "value" and case.in_keys:
                continue
            stored = content
            if case.kv_dtype is not None:
                stored, scales = quantise(content, case.kv_dtype)
                getattr(cache, f"{name}_scale_slots")[LAYER][slots] = scales.to(device)
            getattr(cache, f"{name}_slots")[LAYER][slots] = stored.to(device)
    picked = replace(
        case, rows=tuple(case.rows[row] for row in chosen), trees=tuple(case.row_trees[row] for row in chosen)
    )
    return Problem(
        picked, cache, sequences, torch.cat([queries[row] for row in chosen]).to(device), sinks, 0.9 * key_dim**-0.5
    )


def give_back_fronts(problem: Problem) -> None:
    """Free what the window of a problem does not see, at least one page of it, and fill all free pages with NaN."""
    case, cache = problem.case, problem.cache
    assert case.window is not None
    free = cache.free_pages
    for sequence, length, new, tree in zip(
        problem.sequences, case.lengths, case.query_lengths, case.row_trees, strict=True
    ):
        cache.free_front(sequence, length - max(new, len(tree)), case.window)  # after the cache's sinks
    assert cache.free_pages > free
    owned = {page for sequence in problem.sequences for page in cache.pages(sequence)}
    for memory in (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales):
        for page in {*range(cache.num_pages)} - owned:
            if memory is not None and memory.dtype != torch.int8:
                memory[:, page].copy_(torch.full((), float("nan")))


WINDOWS = [  # of the first two the window begins with the last token of a page
    Case(rows=((63, 1),), window=5),
    Case(rows=((63, 1),), parents=BRANCHING, window=5, softcap=3.0),
    Case(rows=((17, 1), (0, 63), (113, 17)), parents=BRANCHING, window=7, page_size=16, sinks=True),
    Case(rows=((30, 3), (40, 1)), parents=SEVENTY, window=9, page_size=1, last=5),
    Case(rows=((100, 1), (33, 2)), window=1, page_size=24, kv_dtype="int8"),
    Case(rows=((200, 1), (3, 1)), trees=(BRANCHING, ()), window=40, kv_dtype="fp8"),
]


SINKS = [  # first tokens in one tile and in several, inside the window and before it, in parts that begin after them
    Case(rows=((63, 1), (5, 3)), window=5, first=3),
    Case(rows=((40, 2), (90, 1), (0, 37)), parents=BRANCHING, window=7, first=18, page_size=16, sinks=True),
    Case(rows=((300, 1), (2, 2)), trees=(SEVENTY, ()), window=33, first=70, heads=(2, 1), page_size=24),
    Case(rows=((200, 1), (3, 1)), trees=(BRANCHING, ()), window=40, kv_dtype="fp8", softcap=3.0, first=4),
    Case(rows=((700, 1), (0, 150)), window=90, heads=(2, 1), dims=(16, 16), page_size=128, first=4),
]


LATENTS = [  # values are in keys
    Case(rows=((17, 1), (3, 1)), parents=BRANCHING, heads=(16, 1), dims=(576, 512), page_size=64, in_keys=True),
    Case(rows=((150, 1), (5, 3)), heads=(20, 1), dims=(76, 60), page_size=16, in_keys=True, window=40, softcap=3.0),
]


def contents(cache: PagedKVCache, name: str) -> np.ndarray:
    """[slots, G, D] of the layer in float64, as attention should see it."""
    stored = getattr(cache, f"{name}_slots")[LAYER].cpu()
    if cache.kv_dtype is not None:
        stored = dequantise(stored, getattr(cache, f"{name}_scale_slots")[LAYER].cpu())
    return stored.double().numpy()


def oracle(problem: Problem, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """`[T, H, Dv]` in float64, one token, one head at a time; with `return_lse` also `[T, H]`."""
    case, cache = problem.case, problem.cache
    heads, groups = case.heads
    queries = problem.query.cpu().double().numpy().reshape(-1, case.dims[0])
    keys, values = contents(cache, "key"), contents(cache, "value")
    out, lse = [], []
    for sequence, length, new, tree in zip(
        problem.sequences, case.lengths, case.query_lengths, case.row_trees, strict=True
    ):
        prefix = length - len(tree)
        paths = {prefix + node: [prefix + n for n in path(tree, node)] for node in range(len(tree))}
        position = {index: prefix + len(paths[index]) - 1 if index in paths else index for index in range(length)}
        for index in range(length - new, length):
            sees = [*range(prefix), *paths[index]] if index in paths else [*range(index + 1)]
            if case.window is not None:
                sees = [j for j in sees if position[index] - position[j] < case.window or position[j] < case.first]
            slots = cache.slots(sequence, sees)  # raises for one that was given back
            for head in range(heads):
                group = head // (heads // groups)
                scores = problem.scale * (keys[slots, group] @ queries[len(out)])
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores)
                total = weights.sum() + (np.exp(float(problem.sinks[head])) if case.sinks else 0.0)
                out.append(weights @ values[slots, group] / total)
                lse.append(np.log(total))
    result = torch.from_numpy(np.stack(out)).view(-1, heads, case.dims[1])
    return (result, torch.tensor(lse, dtype=torch.float64).view(-1, heads)) if return_lse else result
