"""A new network of a block drafter for a target."""

from typing import Any

import torch
from torch import Tensor

from specdec.drafters.block.config import BlockConfig, require_layers
from specdec.drafters.block.module import BlockModel
from specdec.training.block.beginning import begin_as_last_blocks
from specdec.training.network import begin, layer_fields

MARKOV_STD = 0.5  # of its table: W2, which begins as 0, learns in proportion to it, and 0.04 took hundreds of steps
DSPARK = dict(from_anchor=True, markov="vanilla", markov_rank=256, confidence="markov")  # DFlash has none of these


def default_layers(count: int, wanted: int) -> tuple[int, ...]:
    """The states of a target of `count` layers that a drafter reads: `wanted` ones, evenly from 2 to n - 2 (DFlash).

    Of a target with fewer than five layers all after a layer but the last, of one with a single layer the embeddings.

    >>> default_layers(36, 5), default_layers(20, 1), default_layers(3, 5)
    ((2, 10, 18, 26, 34), (10,), (1, 2))
    """
    first, last = (2, count - 2) if count >= 5 else (min(1, count - 1), count - 1)
    if wanted == 1:
        return (min(max(count // 2, first), last),)
    step = (last - first) / (wanted - 1)
    return tuple(sorted({round(first + step * index) for index in range(wanted)}))


def new_block(model, mask_token: int, draft_tokens: Tensor | None = None, block_size: int = 8, num_layers: int = 1,
              from_blocks: bool = True, **fields: Any) -> BlockModel:  # fmt: skip
    """An untrained network in float32 that borrows the embeddings of `model`, a transformers causal language model.

    It has the sizes of the model's layers, and its output layer where all tokens are drafted; else one of its own,
    which begins as the model's. `fields` of `BlockConfig` replace what that gives; those of DSpark are `DSPARK`.
    Its layers begin as the model's last blocks where these have the same shapes (`beginning`), unless `from_blocks` is
    False; other matrices are drawn from torch's default generator, but what the Markov head adds is nothing at first.
    Raises ValueError for states that the model does not have, or its last one, and for what `BlockConfig` refuses."""
    count = model.config.get_text_config().num_hidden_layers
    sizes = layer_fields(model, draft_tokens, fields)
    own = BlockConfig(**{
        **sizes, "target_layers": default_layers(count, num_layers), "block_size": block_size,
        "mask_token": mask_token, "num_layers": num_layers, "output": "target" if draft_tokens is None else "own",
    } | fields)  # fmt: skip
    require_layers(own.target_layers, count)
    network = BlockModel(own, draft_tokens)
    begin(network, model, draft_tokens)
    if from_blocks:
        begin_as_last_blocks(network, model)
    if network.markov_head is not None:
        torch.nn.init.normal_(network.markov_head.markov_w1.weight, std=MARKOV_STD)
        torch.nn.init.zeros_(network.markov_head.markov_w2.weight)
    return network
