"""Whether a model over pages gives the logits that it gives by itself: the second check when one is wrapped."""

from typing import TYPE_CHECKING

import torch

from attention.gpu import on
from attention.hf.probe import LONGEST, UnsupportedArchitecture, telling_length
from attention.kv.cache import PagedKVCache
from attention.paged.batch import build_batch

if TYPE_CHECKING:  # the adapter calls this
    from attention.hf.adapter import ModelAdapter

FINE, COARSE = 0.02, 0.2  # difference, in largest logits, that is no rounding any more: in 32 bits, in 16 or fewer


def require_same_logits(adapter: "ModelAdapter", coarse: bool = False) -> None:
    """Compare logits over pages, computed in two pieces, with the untouched model's.

    They differ for a model with further state, or with windows that it applies itself; hence as many tokens (up to
    LONGEST) as it takes for all windows of the configuration to have an effect. A sum of float32 that is rounded
    otherwise by 1e-7 differs by no more, unless it is made an 8-bit number next (`coarse`: activations are): half a
    step of 127 is more than the rounding of 16 bits, and a few such steps moved logits by 0.016 of the largest one in a
    model that its own cache moves by as much. Raises UnsupportedArchitecture."""
    model, limit = adapter.model, COARSE if coarse else FINE
    length = min(telling_length(model.config.get_text_config()), adapter.max_positions or LONGEST)
    tokens = torch.arange(length, device=adapter.device) % adapter.vocab_size
    positions = torch.arange(length, device=adapter.device)[None]
    sizes = -(-length // 4), 4
    cache = PagedKVCache.for_layout(
        adapter.layout, *sizes, adapter.all_devices, dtype=adapter.dtype, device=adapter.device
    )
    sequence, pieces = cache.add(), []
    for piece in tokens.split((length + 1) // 2):
        cache.append([sequence], [len(piece)])
        batch = build_batch(cache, [sequence], [len(piece)])
        pieces.append(adapter.forward(piece, batch.positions, batch, None))
    with torch.inference_mode(), on(adapter.device):
        itself = model(input_ids=tokens[None], position_ids=positions, use_cache=False, return_dict=True)
        expected = itself.logits[0].float()
    error, scale = float((torch.cat(pieces).float() - expected).abs().max()), float(expected.abs().max())
    # rounding errors are far smaller; NaN weights give NaN here and are reported when they produce a token
    if error > (limit if adapter.dtype in (torch.float32, torch.float64) else COARSE) * scale:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} gives other logits over a paged cache than by itself (difference "
            f"{error:.2g}, largest logit {scale:.2g}, "
            f"{length} tokens): it keeps state beside keys and values, or masks in a way of its own"
        )
