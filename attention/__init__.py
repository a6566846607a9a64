"""Attention core: paged attention, the KV-cache manager and the transformers adapter. The ground floor; imports nothing above it."""

from attention.batch import AttentionBatch
from attention.cache import OutOfPages, PagedKVCache
from attention.hf_adapter import ModelAdapter, UnsupportedArchitecture
from attention.paged import paged_attention

__all__ = ["AttentionBatch", "ModelAdapter", "OutOfPages", "PagedKVCache", "UnsupportedArchitecture", "paged_attention"]
