"""One layer of a forward over pages: new keys and values are stored, then queries attend to all of them."""

from functools import partial

from torch import Tensor

from attention.kv.write import store
from attention.paged.api import attend
from attention.paged.batch import AttentionBatch
from attention.paged.recorded import native_layer, record_layer
from attention.recording import current, native_sink


def store_only(batch: AttentionBatch, layer: int, keys: Tensor, values: Tensor) -> None:
    """Store `keys [T, G, D]` and `values [T, G, Dv]` of the batch's new tokens, which do not attend.

    In a recording this is one step of it."""
    write = partial(store, batch.cache, layer, keys, values, batch.slots, padding=batch.padding)
    if (recorder := current()) is None:
        write()
    else:
        recorder.leaf(write, keys, values, batch.slots)


def store_and_attend(batch: AttentionBatch, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float,
                     window: int | None = None, softcap: float | None = None,
                     sinks: Tensor | None = None, store_new: bool = True) -> Tensor:  # fmt: skip
    """Store `keys [T, G, D]` and `values [T, G, Dv]`, and attend with `queries [T, H, D]` -> `[T, H, Dv]`.

    layer: of the batch's cache; scale, window, softcap, sinks: see `attention.paged.api.paged_attention`.
    store_new: False where an earlier layer of this forward has stored them, which this one shares.

    In a recording the layer is one step of it."""
    window = batch.cache.narrowed(window)
    given = batch, layer, queries, keys, values, scale, window, softcap, sinks
    out: Tensor | tuple[Tensor, Tensor] | None = None
    if (recorder := current()) is not None:
        out = record_layer(recorder, *given, store_new=store_new)
    elif not batch.tail and (sink := native_sink()) is not None:
        out = native_layer(sink, *given, store_new=store_new)
    if out is None:
        if store_new:
            store(batch.cache, layer, keys, values, batch.slots, padding=batch.padding)
        out = attend(queries, layer, batch, scale, window, softcap, sinks)
    assert isinstance(out, Tensor)  # without return_lse
    # padding gets zeros: models that compute over all tokens (scales of 8-bit activations) must not read garbage
    if batch.tail:
        out = out.masked_fill(batch.derived("unstored", lambda batch: (batch.slots < 0)[:, None, None]), 0.0)
    return out
