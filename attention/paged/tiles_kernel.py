"""Tiles for paged attention: page lookups, loads, tree masks, conversion of 8-bit numbers."""

import triton
import triton.language as tl


@triton.jit
def look_up(table, key, end, P: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the keys key .. key + BLOCK_N - 1: a scalar where the tile is inside one page, else [BLOCK_N]."""
    if P % BLOCK_N == 0:
        pages = tl.load(table + key // P, mask=key < end, other=0)
    else:
        keys = key + tl.arange(0, BLOCK_N)
        pages = tl.load(table + keys // P, mask=keys < end, other=0)
    return pages.to(tl.int64)


@triton.jit
def load_tile(pages, first, offsets, inside,
              STRIDE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """[BLOCK_N, WIDTH_PAD], columns of one kv head at slots first + offsets, of which each has STRIDE numbers.

    `pages` points at the first column in slot 0."""
    d = tl.arange(0, WIDTH_PAD)
    pointers = pages + first * STRIDE + (offsets[:, None] * STRIDE + d[None, :])
    if MASKED:
        tile = tl.load(pointers, mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH_PAD != WIDTH:
        tile = tl.load(pointers, mask=(d < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_scales(scales, first, offsets, inside, GROUPS: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N] scales of one kv head at slots first + offsets; `scales` points at that head in slot 0."""
    if MASKED:
        tile = tl.load(scales + first * GROUPS + offsets * GROUPS, mask=inside, other=0.0)
    else:
        tile = tl.load(scales + first * GROUPS + offsets * GROUPS)
    return tile


@triton.jit
def row_words(bit_rows, node, in_tree, WORDS: tl.constexpr):
    """For each row 32 bits: which of the nodes node .. node + 31 it sees; all see what is before the tree."""
    pair = tl.zeros(in_tree.shape, tl.int64)
    for half in tl.static_range(2):
        index = (node >> 5) + half
        word = tl.load(bit_rows + tl.minimum(tl.maximum(index, 0), WORDS - 1), mask=in_tree, other=-1)
        word = tl.where(index < 0, -1, tl.where(in_tree & (index >= WORDS), 0, word))
        pair |= (word.to(tl.int64) & 0xFFFFFFFF) << (32 * half)
    return (pair >> (node & 31).to(tl.int64)).to(tl.int32)


@triton.jit
def tile_visible(key, length, index, first_node, bit_rows, position, tree_positions_end,
                 BLOCK_N: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: which of the keys key .. key + BLOCK_N - 1 each row sees, by causality, tree and window.

    The FIRST keys are in every window."""
    n = tl.arange(0, BLOCK_N)
    j = key + n
    visible = j[None, :] <= index[:, None]
    key_position = j
    if WORDS > 0:
        node = j - first_node
        word = tl.zeros([index.shape[0], BLOCK_N], tl.int32)
        for part in tl.static_range((BLOCK_N + 31) // 32):
            row_word = row_words(bit_rows, key + 32 * part - first_node, index >= first_node, WORDS)
            word = tl.where((n // 32 == part)[None, :], row_word[:, None], word)
        visible = visible & (((word >> (n & 31)[None, :]) & 1) == 1)
        if WINDOW is not None:
            in_tail = (node >= 0) & (j < length)
            of_node = tl.load(tree_positions_end - length + j, mask=in_tail, other=0).to(tl.int32)
            key_position = tl.where(in_tail, of_node, j)
    if WINDOW is not None:
        near = position[:, None] - key_position[None, :] < WINDOW
        if FIRST > 0:
            near = near | (key_position < FIRST)[None, :]
        visible = visible & near
    return visible


@triton.jit
def widen(x, dtype: tl.constexpr):
    """8-bit numbers in `dtype`, exactly."""
    if x.dtype == tl.int8 and dtype == tl.float16:
        # bits of 1024 + (x + 128); the hardware's conversion runs at a quarter of the rate
        wide = ((x.to(tl.int16) & 0xFF) ^ 0x6480).to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    else:
        wide = x.to(dtype)
    return wide


@triton.jit
def even_and_odd(pairs, kind: tl.constexpr, dtype: tl.constexpr):
    """The even and the odd columns of a tile of 8-bit numbers that was loaded as 16-bit pairs."""
    low = pairs.to(tl.int8).to(kind, bitcast=True)
    high = (pairs >> 8).to(tl.int8).to(kind, bitcast=True)
    return widen(low, dtype), widen(high, dtype)
