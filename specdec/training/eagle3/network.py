"""A new EAGLE-3 network for a target, and the tokens that it can draft."""

from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.network.rotation import Rotation
from specdec.training.data import Rows
from specdec.training.labels import IGNORED

FIXED_SCALINGS = ("default", "linear", "llama3", "yarn")  # rotations that are the same for texts of any length


def choose_draft_tokens(rows: Rows, size: int, vocab_size: int) -> tuple[Tensor | None, float]:
    """The `size` tokens that are learned most often in `rows`, in order, and their share of what is learned.

    Of tokens that are as frequent those with smaller ids come first. All tokens are None, as `Eagle3Model` takes them.
    Raises ValueError for a size that the vocabulary does not have."""
    if not 1 <= size <= vocab_size:
        raise ValueError(f"the draft vocabulary has 1 to {vocab_size} tokens, got {size}")
    counts = torch.bincount(rows.labels[rows.labels != IGNORED].long(), minlength=vocab_size)
    if size == vocab_size:
        return None, 1.0
    chosen = counts.sort(descending=True, stable=True).indices[:size].sort().values
    return chosen, float(counts[chosen].sum() / counts.sum().clamp(min=1))


def default_layers(count: int) -> tuple[int, ...]:
    """The states of a target of `count` layers that a drafter reads: EAGLE-3's three, where these are different ones.

    >>> default_layers(32), default_layers(2)
    ((2, 16, 29), (0, 1))
    """
    ids = (2, count // 2, count - 3) if count >= 8 else (0, count // 2, count - 1)
    return tuple(sorted(set(ids)))


def new_eagle3(model, draft_tokens: Tensor | None = None, **fields: Any) -> Eagle3Model:
    """An untrained network in float32 that borrows the embeddings of `model`, a transformers causal language model.

    It has the sizes of the model's layers; `fields` of `Eagle3Config` replace what that gives. Its output layer begins
    as the model's, where that has the same width. Matrices are drawn from torch's default generator."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    hidden, heads = config.hidden_size, config.num_attention_heads
    vocab, width = head.weight.shape
    given = fields.get("hidden_size", hidden), fields.get("num_heads", heads)
    head_dim = fields.pop("head_dim", None) or getattr(config, "head_dim", None) or given[0] // given[1]
    own = Eagle3Config(**{
        "hidden_size": hidden, "target_hidden_size": hidden, "target_vocab_size": vocab,
        "draft_vocab_size": vocab if draft_tokens is None else len(draft_tokens),
        "target_layers": default_layers(config.num_hidden_layers), "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * hidden,
        "rotation": _rotation(config, head_dim), "embedding_size": model.get_input_embeddings().weight.shape[-1],
    } | fields)  # fmt: skip
    network = Eagle3Model(own, draft_tokens)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=getattr(config, "initializer_range", None) or 0.02)
    if own.output == "own" and width == own.hidden_size:
        rows = plain_weight(head)
        with torch.no_grad():
            network.lm_head.weight.copy_(rows if draft_tokens is None else rows[draft_tokens.to(rows.device)])
    embeddings = None if own.own_embeddings else model.get_input_embeddings()
    network.borrow(embeddings, head if own.output == "target" else None)
    return network.to(head.weight.device)


def plain_weight(layer: nn.Module) -> Tensor:
    """A layer's weight as a plain tensor, also of a quantised layer."""
    weight: Any = layer.weight
    return weight.detach() if type(weight.data) is Tensor else weight.dequantize()


def _rotation(config, head_dim: int) -> Rotation:
    """The model's own rotation of all dimensions where it is the same for texts of any length, else a plain one."""
    given = dict(getattr(config, "rope_parameters", None) or {})
    if given.get("rope_type", "default") not in FIXED_SCALINGS or "rope_theta" not in given:
        given = {"rope_type": "default", "rope_theta": given.get("rope_theta", 10_000.0)}
    given.pop("partial_rotary_factor", None)
    return Rotation(head_dim, given, getattr(config, "max_position_embeddings", None) or 2048)
