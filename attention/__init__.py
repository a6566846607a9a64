"""Paged and flash attention, the KV cache and the adapters to transformers; imports nothing of the other packages."""

from attention.flash.api import flash_attention, flash_implementation
from attention.hf.adapter import ModelAdapter, UnsupportedArchitecture
from attention.hf.flash import register_flash_attention
from attention.kv.cache import PagedKVCache
from attention.kv.page_table import OutOfPages
from attention.kv.write import write_kv
from attention.paged.api import paged_attention
from attention.paged.batch import AttentionBatch, ancestor_bits, build_batch

__all__ = [
    "AttentionBatch",
    "ModelAdapter",
    "OutOfPages",
    "PagedKVCache",
    "UnsupportedArchitecture",
    "ancestor_bits",
    "build_batch",
    "flash_attention",
    "flash_implementation",
    "paged_attention",
    "register_flash_attention",
    "write_kv",
]
