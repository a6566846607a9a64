"""Writes new keys and values into the pages of one layer in one launch, and quantises them there if pages are 8-bit."""

import torch
from torch import Tensor

from attention.dispatch import resolve
from attention.kv.cache import PagedKVCache
from attention.kv.quantization import quantise


def write_kv(cache: PagedKVCache, layer: int, key: Tensor, value: Tensor, slots: Tensor, impl: str | None = None,
             padding: bool = True) -> None:  # fmt: skip
    """Store `key [T, G, D]` and `value [T, G, Dv]`, of any strides, at `slots [T]` of one layer of `cache`.

    Slots are int64 and distinct. A token with a negative slot is skipped: the padding of a batch of fixed size;
    `padding=False` promises that there is none. A cache whose values are in its keys stores the keys alone. Raises
    ValueError for a layer, shape or dtype that does not fit the cache, or an `impl` that cannot run."""
    if not 0 <= layer < cache.num_layers:
        raise ValueError(f"layer must be one of the cache's {cache.num_layers}, got {layer}")
    wanted = (slots.shape[0], *cache.key_pages.shape[3:]), (slots.shape[0], *cache.value_pages.shape[3:])
    if key.shape != wanted[0] or value.shape != wanted[1] or key.dtype != cache.dtype or value.dtype != cache.dtype:
        raise ValueError(
            f"the cache takes keys {list(wanted[0])} and values {list(wanted[1])} of {cache.dtype} at {slots.shape[0]} "
            f"slots, got {list(key.shape)} of {key.dtype} and {list(value.shape)} of {value.dtype}"
        )
    store(cache, layer, key, value, slots, impl, padding)


def store(cache: PagedKVCache, layer: int, key: Tensor, value: Tensor, slots: Tensor, impl: str | None = None,
          padding: bool = True) -> None:  # fmt: skip
    """`write_kv` without its checks, for arguments that are known to fit: those of a model that was probed."""
    if resolve(impl, cache.device) == "reference" and not torch.compiler.is_compiling():
        # what the op calls too: going through torch's dispatcher costs more than the write
        key_scales = cache.key_scale_slots[layer] if cache.key_scale_slots else None
        value_scales = cache.value_scale_slots[layer] if cache.value_scale_slots else None
        key_slots, value_slots = cache.key_slots[layer], None if cache.values_in_keys else cache.value_slots[layer]
        write_rows(key_slots, value_slots, key_scales, value_scales, key, value, slots, cache.kv_dtype, padding)
    else:
        value_pages = None if cache.values_in_keys else cache.value_pages
        pages = cache.key_pages, value_pages, cache.key_scales, cache.value_scales
        torch.ops.specdec.write_kv(*pages, key, value, slots, layer, cache.kv_dtype, impl)


def write_rows(key_slots: Tensor, value_slots: Tensor | None, key_scale_slots: Tensor | None,
               value_scale_slots: Tensor | None, key: Tensor, value: Tensor, slots: Tensor, kv_dtype: str | None,
               padding: bool = True) -> None:  # fmt: skip
    """The specification: `write_kv` over the slots of one layer, `[num_slots, G, D]`, and their scales.

    value_slots: None where values are in keys."""
    if padding and slots.numel() and int(slots.min()) < 0:
        kept = slots >= 0
        key, value, slots = key[kept], value[kept], slots[kept]
    for rows, scales, new in ((key_slots, key_scale_slots, key), (value_slots, value_scale_slots, value)):
        if rows is None:
            continue
        if kv_dtype is None or scales is None:
            rows.index_copy_(0, slots, new)
            continue
        q, scale = quantise(new, kv_dtype)
        # as bytes: index_copy_ does not take 8-bit floats
        rows.view(torch.uint8).index_copy_(0, slots, q.view(torch.uint8))
        scales.index_copy_(0, slots, scale)


def _write_kv(key_pages, value_pages, key_scales, value_scales, key, value, slots, layer, kv_dtype, impl) -> None:
    if resolve(impl, key_pages.device) == "reference":
        key_slots = key_pages[layer].flatten(0, 1)
        value_slots = None if value_pages is None else value_pages[layer].flatten(0, 1)
        scales = [None if x is None else x[layer].flatten(0, 1) for x in (key_scales, value_scales)]
        return write_rows(key_slots, value_slots, scales[0], scales[1], key, value, slots, kv_dtype)
    from attention.kv.write_kernel import launch_write_kv

    return launch_write_kv(key_pages, value_pages, key_scales, value_scales, key, value, slots, layer, kv_dtype)


# all layers' pages and an index, not one layer's view: a compiled model then mutates one input, not many that alias
torch.library.define("specdec::write_kv",
                     "(Tensor(a!) key_pages, Tensor(b!)? value_pages, Tensor(c!)? key_scales, "
                     "Tensor(d!)? value_scales, Tensor key, Tensor value, Tensor slots, int layer, str? kv_dtype, "
                     "str? impl) -> ()")  # fmt: skip
torch.library.impl("specdec::write_kv", "CompositeExplicitAutograd", _write_kv)
torch.library.register_fake("specdec::write_kv", lambda *arguments: None)
