"""How paged attention divides its work: query tiles, split over their keys (Dao et al. 2023, Flash-Decoding).

A program's share is the sum over sequences of (query tiles x key tiles), divided by the S programs that run at once; a
sequence with more key tiles than that is split into parts. With nearly as many query tiles as programs, or more, the
last wave of programs may leave most of the GPU idle; halving the share costs a little more work and fills it better. So
the plan compares shares for 1 to WAVES waves by  waves x (key tiles of the longest part + OVERHEAD)  and takes the
cheapest.

Every program computes this from the lengths on the device, with a few operations on vectors of one element a sequence,
so the grid depends on shapes alone and a CUDA graph may replay it with other lengths. Bounds that the launcher relies
on: there are at most WAVES S + (query tiles) items, at most WAVES S split tiles, and those have at most 2 WAVES S
parts, since a split tile has more key tiles than a share."""

import triton
import triton.language as tl

OVERHEAD = tl.constexpr(3)  # cost of starting, ending and merging a part, in key tiles

# a batch's tensors are views into one, so their alignment varies; kernels must not be recompiled for each
BATCH_TENSORS = ["tables", "kv_lengths", "cu_seqlens_q", "positions", "tree_bits", "cu_tree_sizes", "tree_positions"]


@triton.jit
def split_plan(kv_lengths, cu_seqlens_q, cu_tree_sizes, B, programs,
               WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr,
               WAVES: tl.constexpr, B_PAD: tl.constexpr):  # fmt: skip
    """Per sequence [B_PAD]: its query tiles, and the number of parts that the keys of each are split into.

    `cu_tree_sizes` (None: no trees) matters with a WINDOW only."""
    row = tl.arange(0, B_PAD)
    length = tl.load(kv_lengths + row, mask=row < B, other=0).to(tl.int32)
    new = _count(cu_seqlens_q, row, B)
    query_tiles = tl.cdiv(new, BLOCK_Q)
    nodes = length * 0
    if WINDOW is not None and cu_tree_sizes is not None:
        nodes = _count(cu_tree_sizes, row, B)
    key_tiles = tl.cdiv(length, BLOCK_N) - first_key(length, new, nodes, WINDOW) // BLOCK_N
    work = tl.sum(query_tiles.to(tl.int64) * key_tiles, 0)  # two prompts of 128k tokens exceed 32 bits
    share = tl.minimum(tl.maximum(tl.cdiv(work, programs), MIN_TILES), 1 << 30).to(tl.int32)
    if WAVES > 1:
        longest = tl.maximum(tl.max(key_tiles, 0), 1)
        whole = share
        cheapest = _cost(query_tiles, key_tiles, longest, share, programs)
        for waves in tl.static_range(2, WAVES + 1):
            other = tl.maximum(tl.cdiv(whole, waves), MIN_TILES)
            cost = _cost(query_tiles, key_tiles, longest, other, programs)
            share = tl.where(cost < cheapest, other, share)
            cheapest = tl.minimum(cost, cheapest)
    return query_tiles, tl.cdiv(key_tiles, share)


@triton.jit
def _count(cumulative, row, B):
    """The differences [B_PAD] of a cumulative count [B + 1]."""
    end = tl.load(cumulative + row + 1, mask=row < B, other=0)
    return (end - tl.load(cumulative + row, mask=row < B, other=0)).to(tl.int32)


@triton.jit
def _cost(query_tiles, key_tiles, longest, share, programs):
    """Estimated time, in key tiles, until all parts of at most `share` key tiles are done."""
    items = tl.sum(query_tiles.to(tl.int64) * tl.cdiv(key_tiles, share), 0)
    return tl.cdiv(items, programs) * (tl.cdiv(longest, tl.cdiv(longest, share)) + OVERHEAD)


@triton.jit
def first_key(length, new, nodes, WINDOW: tl.constexpr):
    """The first key that any of the last `new` tokens may see, where the last `nodes` are a tree's.

    No node's position is before the first node's, whatever its index: the window counts back from there."""
    first = length * 0
    if WINDOW is not None:
        first = tl.maximum(length - tl.maximum(new, nodes) - WINDOW + 1, 0)
    return first


@triton.jit
def locate(counts, index, B_PAD: tl.constexpr):
    """Item `index` of a list with counts[b] items of sequence b -> (b, which of its items); b >= B past the end."""
    sequence = tl.sum((tl.cumsum(counts, 0) <= index).to(tl.int32), 0)
    return sequence, index - tl.sum(tl.where(tl.arange(0, B_PAD) < sequence, counts, 0), 0)


@triton.jit
def parts_before(query_tiles, parts, sequence, B_PAD: tl.constexpr):
    """Parts of the split query tiles of all sequences before `sequence`: its first place in scratch memory."""
    return tl.sum(tl.where((tl.arange(0, B_PAD) < sequence) & (parts > 1), query_tiles * parts, 0), 0)


@triton.jit
def pick(values, sequence, B_PAD: tl.constexpr):
    """values[sequence] of a vector [B_PAD]."""
    return tl.sum(tl.where(tl.arange(0, B_PAD) == sequence, values, 0), 0)
