"""Paged and flash attention, the KV cache and the adapters to transformers; imports nothing of the other packages."""

from attention.flash.api import flash_attention, flash_implementation
from attention.hf.adapter import ModelAdapter, UnsupportedArchitecture
from attention.hf.flash import register_flash_attention
from attention.kv.cache import PagedKVCache
from attention.kv.page_table import OutOfPages
from attention.paged.api import paged_attention
from attention.paged.batch import AttentionBatch

__all__ = [
    "AttentionBatch",
    "ModelAdapter",
    "OutOfPages",
    "PagedKVCache",
    "UnsupportedArchitecture",
    "flash_attention",
    "flash_implementation",
    "paged_attention",
    "register_flash_attention",
]
