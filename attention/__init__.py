"""Attention core: paged and flash attention, the KV-cache manager and the adapters to transformers. The ground floor; imports nothing above it."""

from attention.batch import AttentionBatch
from attention.cache import OutOfPages, PagedKVCache
from attention.flash import flash_attention, flash_implementation
from attention.hf_adapter import ModelAdapter, UnsupportedArchitecture
from attention.hf_flash import register_flash_attention
from attention.paged import paged_attention

__all__ = [
    "AttentionBatch", "ModelAdapter", "OutOfPages", "PagedKVCache", "UnsupportedArchitecture", "flash_attention", "flash_implementation",
    "paged_attention", "register_flash_attention",
]  # fmt: skip
