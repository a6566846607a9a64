"""Tile sizes and launch options of the paged attention kernel.

Those for head dims up to 256 were measured on an H200. Those for wider heads were chosen by what fits into shared
memory and registers (at most 128 numbers of a float32 accumulator a thread) and have not been measured."""

from typing import NamedTuple

import torch

from attention.gpu import shared_memory

WIDE = 256  # columns of a head above which tiles are smaller and keys come in two tiles


class PagedConfig(NamedTuple):
    """Tile sizes and launch options; `programs_per_sm` is how many the plan expects to run at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def paged_config(
    rows: int, head_dim: int, element_size: int, page_size: int, crowded: bool = False, idle: bool = False
) -> PagedConfig:
    """The configuration for tiles of up to `rows` = query tokens x heads of a group.

    `crowded`: whole query tiles fill the GPU and each walks over thousands of keys, so larger tiles of keys leave no
    processor without work. `idle`: a few query tiles walk over a few hundred keys each, so only the latency of one
    counts."""
    wide = head_dim > 128
    if head_dim > WIDE:
        if element_size == 4:
            return PagedConfig(16, 16, 4, 1, 1)
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return PagedConfig(block_m, 32, 4 if block_m == 16 else 8, 3, 1)
    if element_size == 4:  # exact float32 products run outside the matrix units
        return PagedConfig(16, 32 if not wide else 16, 4, 1, 2)
    if rows <= 16:
        if wide:
            return PagedConfig(16, 32, 4, 4, 1)
        return PagedConfig(16, 128, 4, 3, 1) if page_size % 128 == 0 else PagedConfig(16, 64, 4, 4, 1)
    if rows <= 32:
        return PagedConfig(32, 64, 4, 3, 1) if not wide else PagedConfig(32, 32, 4, 4, 1)
    if rows <= 64:
        return PagedConfig(64, 64, 4, 3, 2) if not wide else PagedConfig(64, 32, 4, 3, 1)
    if wide:
        return PagedConfig(128, 32, 8, 3, 1)
    # many tiles of one sequence find its keys in the level-2 cache; two programs a processor hide each other's softmax
    if rows > 256:
        return PagedConfig(64, 64, 4, 3, 2)
    if idle:
        return PagedConfig(64, 64, 4, 3, 1)
    return PagedConfig(128, 128, 8, 3, 1) if crowded and page_size % 128 == 0 else PagedConfig(128, 64, 8, 4, 1)


def tile_bytes(config: PagedConfig, key_columns: int, value_columns: int, query_bytes: int, page_bytes: int) -> int:
    """Shared memory of one program: its queries, and the keys and values of all pipeline stages."""
    keys_and_values = config.block_n * (key_columns + value_columns) * page_bytes * config.num_stages
    return config.block_m * key_columns * query_bytes + keys_and_values


def fit(config: PagedConfig, tile: tuple[int, int, int, int], device: torch.device) -> PagedConfig:
    """`config` with fewer pipeline stages, then smaller tiles, until the device's shared memory holds them."""
    too_large = lambda: tile_bytes(config, *tile) > shared_memory(device)
    while too_large() and config.num_stages > 2:
        config = config._replace(num_stages=config.num_stages - 1)
    while too_large() and config.block_n > 16:
        config = config._replace(block_n=config.block_n // 2)
    while too_large() and config.block_m > 16:
        config = config._replace(block_m=config.block_m // 2)
    return config._replace(num_stages=1) if too_large() else config


def padded(width: int, quantised: bool) -> int:
    """Columns of a tile: a power of two, 16 at least, as a matrix product needs.

    128 at least for 8-bit numbers: with 64, Triton 3.6 lets wgmma read past the shared memory that it reserved."""
    return max(128 if quantised else 16, 1 << (width - 1).bit_length())


def key_tiles(width: int, quantised: bool) -> tuple[int, int, int]:
    """How a key of `width` columns is loaded: columns of the first tile, and columns of both tiles with padding.

    >>> key_tiles(192, False), key_tiles(512, False), key_tiles(576, False), key_tiles(520, True)
    ((192, 256, 0), (512, 512, 0), (512, 512, 64), (512, 512, 128))
    """
    main = 1 << width.bit_length() - 1
    if width <= WIDE or main == width:
        return width, padded(width, quantised), 0
    return main, main, padded(width - main, quantised)


def head_splits(heads: int, head_dim: int, tile: tuple[int, int, int, int], device: torch.device) -> int:
    """Into how many parts of equal size the `heads` of a kv group are split, so that a tile holds one token of a part.

    tile: see `tile_bytes`.

    >>> cpu = torch.device("cpu")
    >>> head_splits(128, 128, (128, 128, 2, 2), cpu), head_splits(128, 576, (576, 512, 2, 2), cpu)
    (1, 2)
    """
    if head_dim <= WIDE:
        return 1
    most = fit(paged_config(heads, head_dim, tile[2], page_size=128), tile, device).block_m
    return next(n for n in range(1, heads + 1) if heads % n == 0 and padded(heads // n, False) <= most)
