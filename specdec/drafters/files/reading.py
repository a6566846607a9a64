"""What a drafter's file says in any format: fields of its decoder layers, its rotation, its layers of the target."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from specdec.drafters.files.fields import Fields
from specdec.drafters.network.rotation import Rotation

Config = TypeVar("Config")
LAYER_KINDS = ("full_attention", "sliding_attention")
ROPE_NAMES = {"su": "longrope", "mrope": "default"}  # positions of text are the same in all sections of "mrope"


@dataclass(frozen=True, slots=True)
class TargetShape:
    """What of a target its drafters depend on.

    embedding_size, output_size: widths of its embeddings and of what its output layer reads.
    """

    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    embedding_size: int
    output_size: int


@dataclass(frozen=True, slots=True)
class Reading(Generic[Config]):
    """A file as its format reads it.

    weights: by the names of the network, without the vocabulary map.
    spare: weights that another reading would use in place of one of these.
    notes: what the file says and what its format decides, a line each.
    num_tokens: how many it drafts by itself (None: it does not say).
    """

    config: Config
    weights: Mapping[str, Tensor]
    draft_tokens: Tensor | None
    spare: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    num_tokens: int | None = None


def refuse_quantised(fields: Fields) -> None:
    """Raise ValueError, naming the method, for files whose weights are quantised."""
    for name in ("quantization_config", "compression_config"):
        method = fields.take(name, dict, {}).get("quant_method", "an unnamed method")
        fields.refuse(name, f"and weights quantised by {method} are not read: unpack them into plain ones first", {})


def layer_fields(fields: Fields, qk_norm: bool, default_head_dim: int | None = None) -> dict[str, Any]:
    """The fields of a config that describe a decoder layer, as transformers' Llama and Qwen3 name them."""
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    head_dim = fields.take("head_dim", int, default_head_dim or max(1, hidden // max(heads, 1)))
    return dict(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=fields.take("num_key_value_heads", int, heads),
        intermediate_size=fields.take("intermediate_size", int),
        activation=fields.take("hidden_act", str, "silu"),
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        attention_bias=fields.take("attention_bias", bool, False),
        mlp_bias=fields.take("mlp_bias", bool, False),
        rotation=read_rotation(fields, head_dim),
        qk_norm=qk_norm,
    )


def read_rotation(fields: Fields, head_dim: int) -> Rotation:
    """The rotation of old and new configs: `rope_theta` and `rope_scaling`, or `rope_parameters`, which come first."""
    values = fields.take("rope_scaling", dict, {}) | fields.take("rope_parameters", dict, {})
    if any(
        name in values for name in LAYER_KINDS
    ):  # one for each kind of layer: speculators takes that of sliding ones
        values = values.get("sliding_attention", values.get("full_attention")) or {}
    values = {name: value for name, value in values.items() if value is not None}
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    values["rope_type"] = ROPE_NAMES.get(kind, kind)
    values.setdefault("rope_theta", fields.take("rope_theta", float, 10_000.0))
    fields.take("rope_theta", float, 0.0)
    share = values.pop("partial_rotary_factor", fields.take("partial_rotary_factor", float, 1.0))
    if share != 1.0 and values["rope_type"] == "default":
        raise ValueError(
            f"{fields.where}: partial_rotary_factor is {share} with rope_type 'default', which speculators trains "
            "as 1.0 and vLLM runs as it is"
        )
    values |= {} if share == 1.0 else dict(partial_rotary_factor=share)
    return Rotation(head_dim, values, fields.take("max_position_embeddings", int, 2048))


def layer_ids(given: list | None, offset: int, field_name: str, target: TargetShape) -> tuple[tuple[int, ...], str]:
    """The states that a drafter reads, as indices of `output_hidden_states`, and where they come from, as a note.

    given: as in the file, `offset` below such an index; None: the original's three."""
    count = target.num_layers
    if given is None:
        ids = (2, count // 2, count - 3)
        if len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(f"{field_name} is missing, and [2, n // 2, n - 3] is {list(ids)} for {count} layers")
        return ids, f"target_layers {ids}: {field_name} is missing, so [2, n // 2, n - 3] of {count} layers"
    if not given or any(type(index) is not int for index in given):
        raise ValueError(f"{field_name} must be a list of integers, got {given!r}")
    ids = tuple(index + offset for index in given)
    if max(ids) > count or min(ids) < 0:
        raise ValueError(
            f"{field_name} {given} means the states {list(ids)} of 0 to {count} (0: the embeddings): {target.name} has "
            f"{count} layers"
        )
    how = "outputs of layers, so one more" if offset else "as in output_hidden_states"
    return ids, f"target_layers {ids}: {field_name} is {given}, {how}"


def draft_vocabulary(config_size: int, vocab_size: int, weights: dict[str, Tensor]) -> Tensor | None:
    """The target's ids of the draft vocabulary out of `d2t`, whose entries are offsets; takes `d2t` and `t2d` away.

    Raises ValueError for maps that lack tokens or contradict each other."""
    offsets, mask = weights.pop("d2t", None), weights.pop("t2d", None)
    if offsets is None:
        if config_size != vocab_size:
            raise ValueError(f"d2t is missing: which {config_size} of {vocab_size} tokens are drafted is unknown")
        return None
    if offsets.shape != (config_size,) or offsets.is_floating_point():
        raise ValueError(
            f"d2t must hold {config_size} integers (draft_vocab_size), got {offsets.dtype} {list(offsets.shape)}"
        )
    tokens = torch.arange(config_size) + offsets.long()
    if mask is not None:
        if mask.shape != (vocab_size,):
            raise ValueError(f"t2d must have {vocab_size} entries (vocab_size), got {list(mask.shape)}")
        if not torch.equal(mask.bool().nonzero()[:, 0], tokens.sort().values):
            raise ValueError(
                f"d2t and t2d disagree: d2t names {len(tokens.unique())} tokens, t2d {int(mask.bool().sum())}"
            )
    whole = config_size == vocab_size and torch.equal(tokens, torch.arange(vocab_size))
    return None if whole else tokens


def read_windows(fields: Fields, asked_for: bool, count: int) -> tuple[int | None, ...] | None:
    """The windows of `count` layers; `asked_for`: only where `use_sliding_window` is true, as in Qwen3."""
    window, used = fields.take("sliding_window", int, None), fields.take("use_sliding_window", bool, False)
    kinds = fields.take("layer_types", list, None)
    if kinds is None:
        return None
    if len(kinds) != count or any(kind not in LAYER_KINDS for kind in kinds):
        raise ValueError(f"{fields.where}: layer_types must be {count} of {', '.join(LAYER_KINDS)}, got {kinds}")
    if window is None or asked_for and not used or "sliding_attention" not in kinds:
        return None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def proposed_tokens(fields: Fields, kind: str) -> int | None:
    """How many tokens the default proposal of a speculators file drafts (None: it does not say)."""
    inner = fields.section("speculators_config")
    if (algorithm := inner.take("algorithm", str, kind)) != kind:
        raise ValueError(f"speculators_model_type is {kind!r} and algorithm of {inner.where} {algorithm!r}")
    inner.take("verifier", dict, {})
    default = inner.take("default_proposal_method", str, None)
    for method in inner.take("proposal_methods", list, []):
        if default in (None, method.get("proposal_type")) and method.get("speculative_tokens"):
            return int(method["speculative_tokens"])
    return None
