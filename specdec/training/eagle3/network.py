"""A new EAGLE-3 network for a target."""

from typing import Any

import torch
from torch import Tensor

from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.network import begin, initial_std, layer_fields


def default_layers(count: int) -> tuple[int, ...]:
    """The states of a target of `count` layers that a drafter reads: EAGLE-3's three, where these are different ones.

    >>> default_layers(32), default_layers(2)
    ((2, 16, 29), (0, 1))
    """
    ids = (2, count // 2, count - 3) if count >= 8 else (0, count // 2, count - 1)
    return tuple(sorted(set(ids)))


def new_eagle3(model, draft_tokens: Tensor | None = None, **fields: Any) -> Eagle3Model:
    """An untrained network in float32 that borrows the embeddings of `model`, a transformers causal language model.

    It has the sizes of the model's layers; `fields` of `Eagle3Config` replace what that gives. With a `mask_token`,
    P-EAGLE's, it has embeddings of its own, which learn, unless `own_embeddings` says otherwise. Its output layer and
    own embeddings begin as the model's, where those have the same width. Matrices, and P-EAGLE's learned feature, are
    drawn from torch's default generator."""
    config = model.config.get_text_config()
    sizes = layer_fields(model, draft_tokens, fields)
    sizes["own_embeddings"] = fields.get("mask_token") is not None
    own = Eagle3Config(**{
        **sizes, "target_hidden_size": config.hidden_size, "target_layers": default_layers(config.num_hidden_layers),
        "embedding_size": model.get_input_embeddings().weight.shape[-1],
    } | fields)  # fmt: skip
    network = Eagle3Model(own, draft_tokens)
    begin(network, model, draft_tokens)
    if own.parallel:
        torch.nn.init.normal_(network.mask_hidden, std=initial_std(model))
    return network
