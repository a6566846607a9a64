"""Sizes, place and weight of an output layer, which may be a quantised layer without a weight (GPTQ, AWQ, ours)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """`[V, H]` of an output layer. Raises ValueError, naming its class, for one that does not say them."""
    if isinstance(weight := getattr(layer, "weight", None), Tensor):
        vocab, hidden = weight.shape
        return vocab, hidden
    sizes = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"the output layer, a {type(layer).__name__}, has no weight, and out_features and in_features are {sizes}: "
            "its size is not known"
        )
    return sizes  # type: ignore[return-value]


def place_of(model: "PreTrainedModel") -> tuple[torch.device, torch.dtype]:
    """Where the output layer of a transformers causal language model computes, and in which dtype.

    Without a weight of its own, packed numbers tell nothing of the dtype: then it is that of the input embeddings."""
    layer = model.get_output_embeddings()
    if isinstance(weight := getattr(layer, "weight", None), Tensor):
        return weight.device, weight.dtype
    held = next(tensor for tensor in (*layer.parameters(), *layer.buffers()))
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return held.device, embeddings.dtype


@torch.no_grad()
def plain_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight `[V, H]` of an output layer as ordinary numbers; `dtype` is that in which it computes.

    A layer without a weight multiplies the unit vectors, one after the other: of each product but one term is zero, so
    these are its dequantised numbers (with a bias up to the rounding of their sum)."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight if type(weight.data) is Tensor else weight.dequantize()
    device = next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
    unit = torch.eye(sizes_of(layer)[1], dtype=dtype, device=device)
    products = layer(unit)
    if getattr(layer, "bias", None) is not None:
        products = products - layer(torch.zeros_like(unit[:1]))
    return products.t()
