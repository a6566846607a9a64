"""The tensors of a call: prompts, their mask, and what else a tokenizer or transformers passes along."""

from collections.abc import Mapping, Sized

import torch
from torch import Tensor

from specdec.model.runner import ModelRunner


def require_device_of(target: ModelRunner, input_ids) -> None:
    """Raise ValueError for prompts that lie elsewhere than the target."""
    if isinstance(input_ids, Tensor) and input_ids.device != target.device:
        raise ValueError(f"input_ids are on {input_ids.device}, the model on {target.device}")


def padding_mask(
    target: ModelRunner, input_ids: Tensor, mask: Tensor | None, pad: int | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Prompts `[B, S]` on the host, which of their tokens are not padding, bool, and how many those are.

    `pad` marks padding where `mask` is None. Prompts on a GPU are read once, those on the host wait for no GPU.

    Raises TypeError or ValueError, naming the value, for prompts that are no ids of the target, empty, or padded on the
    right."""
    if isinstance(input_ids, Mapping) and "input_ids" in input_ids:
        raise TypeError("input_ids must be a tensor [B, S], got all of a tokenizer's output: generate(**inputs)")
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        given = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"input_ids must be an int64 or int32 tensor [B, S], got {given}")
    shape = list(input_ids.shape)
    if len(shape) != 2:
        raise ValueError(f"input_ids must be [B, S], got shape {shape}: input_ids[None] is a batch of one")
    if 0 in shape:
        raise ValueError(
            f"input_ids must be [B, S] with at least one token, got shape {shape}: an empty prompt has no next token"
        )
    input_ids = input_ids.cpu()
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, S] or None, got {mask!r}")
    if mask is None:  # as in transformers: a pad token that is no end-of-text token marks padding
        mask = torch.ones_like(input_ids) if pad is None else input_ids != pad
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {shape}")
    mask = mask.cpu() != 0
    lengths = mask.sum(1).tolist()
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} is an empty prompt: its attention mask is all zero")
    width = shape[1]
    left = torch.arange(width, device=mask.device) >= (width - mask.sum(1, keepdim=True))
    if not bool((mask == left).all()):
        row = int((mask != left).any(1).int().argmax())
        raise ValueError(
            f"prompts must be padded on the left, but the attention mask of row {row} is {mask[row].int().tolist()}"
        )
    broken = ((input_ids < 0) | (input_ids >= target.vocab_size)) & mask
    if bool(broken.any()):
        row = int(broken.any(1).int().argmax())
        raise ValueError(
            f"row {row} holds token id {int(input_ids[row][broken[row]][0])}, outside the vocabulary of "
            f"{target.vocab_size}"
        )
    return input_ids.long(), mask, lengths


def require_unchanged_text(name: str, given, real: Tensor) -> None:
    """Raise ValueError for an input of the model's forward that would change the text.

    real [B, S] bool: which tokens are not padding.

    Values are tested, not names, which change between releases. Empty values are fine, and flags and integers (which
    transformers adds for its own forwards), and integers per token that are all zero or number the tokens from 0."""
    if given is None or isinstance(given, int):
        return
    tokens = _tokens_in(given)
    if tokens is not None:
        if tokens:
            raise ValueError(f"{name} with {tokens} tokens cannot be used: the paged cache starts empty")
        return
    if isinstance(given, Tensor) and not given.is_floating_point() and given.ndim and given.shape[-1] == real.shape[1]:
        given = given.to(real.device)
        if not bool(given.any()) or bool((given == real.cumsum(1) - 1)[..., real].all()):
            return
        if "position" in name:
            raise ValueError(f"{name} cannot be used unless they count from 0, got {given.tolist()}")
    elif given.numel() == 0 if isinstance(given, Tensor) else isinstance(given, Sized) and len(given) == 0:
        return
    what = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
    raise ValueError(f"{name} cannot be used: a prompt is its input_ids and attention_mask; got {what}")


def _tokens_in(given) -> int | None:
    """The number of tokens in a cache, of transformers' class or as a pair of tensors per layer; None: no cache."""
    if hasattr(given, "get_seq_length"):
        return int(given.get_seq_length())
    is_layer = lambda layer: isinstance(layer, tuple | list) and layer and isinstance(layer[0], Tensor)
    pairs = isinstance(given, tuple | list) and given and all(map(is_layer, given))
    return given[0][0].shape[-2] if pairs else None
