"""Drafters in the format of the speculators library, kinds "eagle3" and "peagle" (speculators 0.9.0)."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.reading import feature_norm, own_parts
from specdec.drafters.files.reading import (
    Reading,
    TargetShape,
    draft_vocabulary,
    layer_fields,
    layer_ids,
    proposed_tokens,
    read_windows,
)
from specdec.drafters.files.speculators import open_config

KINDS = ("eagle3", "peagle")
IDS = "eagle_aux_hidden_state_layer_ids"


def read_speculators(config: Mapping[str, Any], weights: Mapping[str, Tensor], target: TargetShape,
                     ignore: Collection[str] = ()) -> Reading[Eagle3Config]:  # fmt: skip
    """Read a config and weights by the rules of the library that writes them.

    ignore: unknown fields that are not errors. Raises ValueError naming a field that is missing or cannot be read."""
    fields, inner, kind, layers = open_config(config, KINDS)
    values = layer_fields(inner, layers == "qwen3", 128 if layers == "qwen3" else None)
    vocab, count = inner.take("vocab_size", int), inner.take("num_hidden_layers", int)
    drafted = fields.take("draft_vocab_size", int)
    layer_list, layers_note = layer_ids(fields.take(IDS, list, None), 0, IDS, target)
    held = dict(weights)
    tokens = draft_vocabulary(drafted, vocab, held)
    values |= dict(
        target_hidden_size=fields.take("target_hidden_size", int, values["hidden_size"]),
        target_vocab_size=vocab, draft_vocab_size=drafted, target_layers=layer_list, num_layers=count,
        feature_norm=feature_norm(fields.where, *(fields.take(x, bool, False) for x in ("fc_norm", "norm_before_fc"))),
        norm_output=fields.take("norm_output", bool, False),
        norm_before_residual=fields.take("norm_before_residual", bool, False),
        windows=read_windows(inner, layers == "qwen3", count),
    )  # fmt: skip
    notes = [f"format: speculators, {kind}, {layers} layers", layers_note]
    if "norm_before_residual" not in fields:
        notes.append("norm_before_residual False: the field is missing, and speculators takes False (vLLM takes True)")
    if kind == "peagle":
        values["mask_token"] = fields.take("mask_token_id", int)
        if values["norm_output"]:
            notes.append("norm_output False: speculators accepts the field for peagle and ignores it")
        values["norm_output"] = False
    fields.take("embed_requires_grad", bool, False)
    fields.take("speculators_version", str, "")
    num_tokens = proposed_tokens(fields, kind)
    for some in (fields, inner):
        some.refuse_others(ignore)
    parts, parts_notes = own_parts(held, values["hidden_size"], drafted == vocab, False, target)
    own = Eagle3Config(**values, **parts)
    return Reading(own, held, tokens, notes=(*notes, *parts_notes), num_tokens=num_tokens)
