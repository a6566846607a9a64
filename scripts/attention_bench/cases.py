"""The attention benchmark's cases: shapes, memory, least bytes and operations, exact answers for some rows.

A case is B sequences of L key positions each, the last N of which are the query tokens: one token (decode), a chain
(verify), or the nodes of a tree. Nothing here knows how any implementation works; the exact answers are dense float64
arithmetic on gathered keys."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention import AttentionBatch, PagedKVCache
from attention.kv.cache import DEFAULT_PAGE_SIZE
from attention.paged.batch import ancestor_bits, build_batch

TOKEN_MULTIPLE = 256  # slots of a layer are a multiple of this, so that every page size up to it divides them


@dataclass(frozen=True, slots=True)
class Case:
    """One row: B sequences of `context` keys, the last `queries` of them new: a causal chain, or a tree (`parents`)."""

    name: str
    batch: int
    context: int
    queries: int = 1
    parents: tuple[int | None, ...] = ()
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = DEFAULT_PAGE_SIZE
    kv_dtype: str | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.parents and len(self.parents) != self.queries:
            raise ValueError(f"a tree of {len(self.parents)} nodes is not {self.queries} queries")
        if not 1 <= self.queries <= self.context or self.heads % self.kv_heads or TOKEN_MULTIPLE % self.page:
            raise ValueError(
                f"{self} needs 1 <= queries <= context, heads a multiple of kv_heads, and a page that divides "
                f"{TOKEN_MULTIPLE}"
            )

    @property
    def tokens(self) -> int:
        """Key positions of all sequences."""
        return self.batch * self.context

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values (and their scales) that one call must read."""
        row = 2 * self.head_dim * self.dtype.itemsize if self.kv_dtype is None else 2 * (self.head_dim + 4)
        return self.tokens * self.kv_heads * row

    @property
    def bytes(self) -> int:
        """All bytes that one call must move: keys and values, queries, output."""
        return self.kv_bytes + 2 * self.batch * self.queries * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Multiply-adds of the two products, counted twice, over the pairs that are visible."""
        return 4 * self.batch * self.heads * self.head_dim * int(self.visible().sum())

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """`[N, L]` bool: the keys each query token sees, the same for every sequence."""
        seen = torch.ones(self.queries, self.context, dtype=torch.bool, device=device)
        seen[:, self.context - self.queries :] = tail_mask(self.parents or chain(self.queries)).to(device)
        return seen


def chain(length: int) -> tuple[int | None, ...]:
    """Parents of a causal chain."""
    return (None, *range(length - 1))


def random_tree(nodes: int, seed: int = 0, branching: int = 3) -> tuple[int | None, ...]:
    """Parents of a random tree, each among the first 1 / `branching` of the nodes before it, as in draft trees."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(nodes, generator=generator).tolist()
    return (None, *(int(draws[node] * (1 + (node - 1) // branching)) for node in range(1, nodes)))


def depths(parents: Sequence[int | None]) -> list[int]:
    """Depth of every node; the root's is 0."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent is None else found[parent] + 1)
    return found


def tail_mask(parents: Sequence[int | None]) -> Tensor:
    """`[N, N]` bool: node i sees node j when j is an ancestor of i or i itself."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent is not None:
            mask[node] |= mask[parent]
    return mask


@dataclass(slots=True)
class Memory:
    """What one case reads: a cache whose layers the calls rotate over, queries for each layer, and the packed batch."""

    case: Case
    cache: PagedKVCache
    batch: AttentionBatch
    queries: list[Tensor]  # one [T, H, D] a layer
    source: tuple[Tensor, Tensor] | None  # [slots, G, D] of the only layer before quantisation

    @property
    def scale(self) -> float:
        """Multiplies the scores."""
        return self.case.head_dim**-0.5

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Unquantised keys and values of a layer as slots `[slots, G, D]`."""
        return self.source or (self.cache.key_slots[layer], self.cache.value_slots[layer])

    def pages(self, layer: int, size: int) -> tuple[Tensor, Tensor]:
        """The same memory as pages of another size, `[pages, size, G, D]`."""
        keys, values = self.rows(layer)
        return keys.unflatten(0, (-1, size)), values.unflatten(0, (-1, size))

    def table(self, size: int) -> Tensor:
        """`[B, pages]` int32: a random block table over pages of that size, the same on every call."""
        each = -(-self.case.context // size)
        generator = torch.Generator().manual_seed(size)
        order = torch.randperm(self.cache.key_slots[0].shape[0] // size, generator=generator)[: self.case.batch * each]
        return order.view(self.case.batch, each).int().to(self.cache.device)


def filled_cache(case: Case, device: torch.device, layers: int) -> PagedKVCache:
    """A cache with room for the case, random keys and values everywhere, and free pages in random order."""
    per_sequence = -(-case.context // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    num_pages = case.batch * per_sequence // case.page
    cache = PagedKVCache(
        layers,
        num_pages,
        case.page,
        case.kv_heads,
        case.head_dim,
        dtype=case.dtype,
        device=device,
        kv_dtype=case.kv_dtype,
    )
    if case.kv_dtype is None:
        for pages in (*cache.key_pages, *cache.value_pages):
            pages.normal_()
    holders = [cache.add() for _ in range(num_pages)]
    cache.append(holders, [case.page] * num_pages)
    for index in torch.randperm(num_pages, generator=torch.Generator().manual_seed(case.page)).tolist():
        cache.free(holders[index])
    return cache


def prepare(case: Case, device: torch.device, layers: int = 1, channel_means: bool = False) -> Memory:
    """Allocate and fill what the case reads, the same on every call with the same torch seed.

    With `channel_means` the keys and values to be quantised scatter with variance 1 about a random mean per head and
    channel, which an average over many keys keeps; without, about 0, where the average shrinks and the relative error
    is at its largest."""
    cache = filled_cache(case, device, layers)
    source = None
    if case.kv_dtype is not None:
        from attention.kv.write import write_kv

        slots = torch.arange(cache.num_pages * cache.page_size, device=device)
        source = tuple(
            torch.randn(len(slots), case.kv_heads, case.head_dim, dtype=case.dtype, device=device) for _ in range(2)
        )
        if channel_means:
            source = tuple(x + torch.randn_like(x[0]) for x in source)
        for layer in range(layers):
            write_kv(cache, layer, *source, slots)
    sequences = [cache.add() for _ in range(case.batch)]
    cache.append(sequences, [case.context] * case.batch)
    tree = (depths(case.parents), ancestor_bits(case.parents)) if case.parents else None
    batch = build_batch(cache, sequences, [case.queries] * case.batch, trees=[tree] * case.batch)
    shape = (case.batch * case.queries, case.heads, case.head_dim)
    return Memory(
        case, cache, batch, [torch.randn(shape, dtype=case.dtype, device=device) for _ in range(layers)], source
    )


def sampled_rows(case: Case, sequences: int = 3, rows: int = 4) -> Iterator[tuple[int, list[int]]]:
    """A few sequences and a few of their query tokens, the first and the last always among them."""
    generator = torch.Generator().manual_seed(case.tokens)

    def pick(count, limit):
        middle = torch.randint(0, limit, (max(0, count - 2),), generator=generator).tolist()
        return sorted({0, limit - 1, *middle})

    for sequence in pick(sequences, case.batch):
        yield sequence, pick(rows, case.queries)


def exact_rows(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`query [N, H, D]` over gathered `keys, values [L, G, D]` under `visible [N, L]`, a plain softmax in float64."""
    repeats = query.shape[1] // keys.shape[1]
    q = query.double().unflatten(1, (keys.shape[1], repeats))
    scores = torch.einsum("ngrd,lgd->ngrl", q, keys.double()) * scale
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = torch.einsum("ngrl,lgd->ngrd", weights / weights.sum(-1, keepdim=True), values.double())
    return out.flatten(1, 2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN stays NaN."""
    return float((actual.double() - expected).norm() / expected.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN is larger than any number."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def sampled_error(
    memory: Memory, output: Tensor, layer: int, table: Tensor, size: int, visible: Tensor | None = None
) -> float:
    """Largest relative error of `out [T, H, D]` on sampled rows against exact answers over `table`, pages of `size`."""
    case = memory.case
    keys, values = memory.rows(layer)
    visible = case.visible(keys.device) if visible is None else visible
    errors = []
    for sequence, rows in sampled_rows(case):
        slots = (table[sequence].long()[:, None] * size + torch.arange(size, device=keys.device)).flatten()[
            : case.context
        ]
        tokens = torch.tensor(rows, device=keys.device)
        index = sequence * case.queries + tokens
        expected = exact_rows(memory.queries[layer][index], keys[slots], values[slots], visible[tokens], memory.scale)
        errors.append(relative_error(output[index], expected))
    return worst(errors)
