"""Tile sizes and launch options of the paged attention kernel, measured on an H200."""

from typing import NamedTuple

import torch

from attention.gpu import shared_memory


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
    """`config` with fewer pipeline stages, then smaller tiles of keys, until the device's shared memory holds them."""
    while tile_bytes(config, *tile) > shared_memory(device) and config.num_stages > 2:
        config = config._replace(num_stages=config.num_stages - 1)
    while tile_bytes(config, *tile) > shared_memory(device) and config.block_n > 16:
        config = config._replace(block_n=config.block_n // 2)
    return config
