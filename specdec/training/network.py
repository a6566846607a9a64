"""A new drafter's network for a target: its sizes, its first weights, and the tokens that it can draft."""

from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters.network.rotation import Rotation
from specdec.training.data import Rows
from specdec.training.labels import IGNORED

FIXED_SCALINGS = ("default", "linear", "llama3", "yarn")  # rotations that are the same for texts of any length


def choose_draft_tokens(rows: Rows, size: int, vocab_size: int) -> tuple[Tensor | None, float]:
    """The `size` tokens that are learned most often in `rows`, in order, and their share of what is learned.

    Of tokens that are as frequent those with smaller ids come first. All tokens are None, as networks take them.
    Raises ValueError for a size that the vocabulary does not have."""
    if not 1 <= size <= vocab_size:
        raise ValueError(f"the draft vocabulary has 1 to {vocab_size} tokens, got {size}")
    counts = torch.bincount(rows.labels[rows.labels != IGNORED].long(), minlength=vocab_size)
    if size == vocab_size:
        return None, 1.0
    chosen = counts.sort(descending=True, stable=True).indices[:size].sort().values
    return chosen, float(counts[chosen].sum() / counts.sum().clamp(min=1))


def layer_fields(model, draft_tokens: Tensor | None, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a drafter's config that follow from the layers of `model`, but for those that are `given`.

    A "head_dim" among those, which is the rotation's, is taken out of them."""
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    vocab = model.get_output_embeddings().weight.shape[0]
    wanted = given.get("hidden_size", hidden), given.get("num_heads", heads)
    head_dim = given.pop("head_dim", None) or getattr(config, "head_dim", None) or wanted[0] // wanted[1]
    return {
        "hidden_size": hidden, "target_vocab_size": vocab,
        "draft_vocab_size": vocab if draft_tokens is None else len(draft_tokens), "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * hidden,
        "rotation": _rotation(config, head_dim),
    }  # fmt: skip


def begin(network: Any, model, draft_tokens: Tensor | None) -> None:
    """Give a new network its first weights, on the device of `model`, and those modules of `model` that it borrows.

    Its matrices are drawn from torch's default generator, as wide as `model` draws its own; embeddings and an output
    layer of its own begin as the model's, where those have the same width."""
    own, head = network.config, model.get_output_embeddings()
    std = initial_std(model)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
    if own.output == "own" and (rows := plain_weight(head)).shape[1] == network.lm_head.weight.shape[1]:
        with torch.no_grad():
            network.lm_head.weight.copy_(rows if draft_tokens is None else rows[draft_tokens.to(rows.device)])
    table = model.get_input_embeddings()
    if own.own_embeddings and table.weight.shape[1] == own.embedded_size:
        with torch.no_grad():
            network.embed_tokens.weight.copy_(plain_weight(table))
    network.borrow(None if own.own_embeddings else table, head if own.output == "target" else None)
    network.to(head.weight.device)


def choose_mask_token(rows: Rows, model) -> int:
    """A token for places that are not known yet: one that `rows` hold never, or as rarely as any.

    Of several it is the last one, but none whose embedding is zero: its queries and keys would have no positions."""
    table = model.get_input_embeddings().weight
    counts = torch.bincount(rows.tokens[rows.documents >= 0].long(), minlength=table.shape[0])[: table.shape[0]]
    usable = (table.detach() != 0).any(1).cpu()
    rarest = counts[usable].min()
    return int((usable & (counts == rarest)).nonzero()[-1])


def initial_std(model) -> float:
    """The standard deviation that `model` draws its own first weights with."""
    return getattr(model.config.get_text_config(), "initializer_range", None) or 0.02


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
