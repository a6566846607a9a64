"""Drafters with a flat Llama config: the original EAGLE-3, SGLang's, SpecForge's and NVIDIA's (SGLang 0.5.23).

Where these differ, SGLang's reading counts, which serves all of them: ids in `eagle_config` are outputs of layers, and
`hidden_norm` norms what layers after the first read. An original file has one layer, `midlayer`, whatever
`num_hidden_layers` says."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.reading import feature_norm, own_parts
from specdec.drafters.files.fields import Fields
from specdec.drafters.files.reading import (
    Reading,
    TargetShape,
    draft_vocabulary,
    layer_fields,
    layer_ids,
    read_windows,
    refuse_quantised,
)

ARCHITECTURES = ("LlamaForCausalLMEagle3", "LlamaForCausalLM", "Eagle3LlamaForCausalLM", "LlamaEagle3DraftModel",
                 "PEagleDraftModel")  # fmt: skip
IDS = "eagle_aux_hidden_state_layer_ids"
MASK_TOKENS = ("mask_token_id", "pard_token", "ptd_token_id")
LEGACY_NAMES = {"midlayer.": "layers.0.", "aux_norm_low.": "fc_norm.0.", "aux_norm_mid.": "fc_norm.1.",
                "aux_norm_high.": "fc_norm.2."}  # fmt: skip
# what NVIDIA's files may ask for beyond EAGLE-3, and what EAGLE-3 is
ORDINARY = {"use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
            "use_mtp_layernorm": False, "parallel_draft_step": 1, "logit_scale": 1.0}  # fmt: skip


def read_flat(config: Mapping[str, Any], weights: Mapping[str, Tensor], target: TargetShape,
              ignore: Collection[str] = ()) -> Reading[Eagle3Config]:  # fmt: skip
    """Read a config and weights as SGLang does.

    ignore: unknown fields that are not errors. Raises ValueError naming a field or a weight that cannot be read."""
    fields = Fields(config, "config.json")
    eagle = fields.section("eagle_config")
    for name in fields.take("architectures", list, []):
        if name not in ARCHITECTURES:
            raise ValueError(f"config.json: architectures must be of {', '.join(ARCHITECTURES)}, got {name!r}")
    if (kind := fields.take("model_type", str, "llama")) != "llama":
        raise ValueError(f"config.json: model_type must be 'llama', got {kind!r}")
    refuse_quantised(fields)
    for some in (fields, eagle):
        for name, value in ORDINARY.items():
            some.refuse(name, f"which is not read here: an EAGLE-3 drafter has {value!r}", value)
    held, count = _our_names(weights, fields)
    values = layer_fields(fields, False)
    vocab = fields.take("vocab_size", int)
    drafted = fields.take("draft_vocab_size", int, vocab)
    states, states_note = _target_layers(fields, eagle, target)
    if (said := fields.take("num_aux_hidden_states", int, len(states))) != len(states):
        raise ValueError(f"config.json: num_aux_hidden_states is {said}, and {IDS} has {len(states)} layers")
    tokens = draft_vocabulary(drafted, vocab, held)
    deeper, spare = _deeper_norms(held, count)
    values |= dict(
        target_hidden_size=fields.take("target_hidden_size", int, values["hidden_size"]), target_vocab_size=vocab,
        draft_vocab_size=drafted, target_layers=states, num_layers=count, feature_norm=_feature_norm(fields, eagle),
        norm_output=fields.take("norm_output", bool, False), deeper_norm=deeper,
        norm_before_residual=fields.take("norm_before_residual", bool, False),
        fusion_bias=fields.take("bias", bool, False), windows=read_windows(fields, False, count),
    )  # fmt: skip
    notes = [f"format: flat Llama config ({'midlayer' if _is_original(weights) else 'layers'}), read as SGLang does"]
    notes.append(states_note)
    if "mask_hidden" in held:
        values["mask_token"] = _mask_token(fields)
    if "norm_before_residual" not in fields:
        notes.append("norm_before_residual False: the field is missing, and this format has no other")
    if count > 1:
        both = ", of which the file has both" if spare else ""
        notes.append(f"deeper_norm {deeper}: norms what layers after the first read{both}")
    parts, parts_notes = own_parts(
        held, values["hidden_size"], drafted == vocab, fields.take("tie_word_embeddings", bool, False), target
    )
    for some in (fields, eagle):
        some.refuse_others(ignore)
    return Reading(Eagle3Config(**values, **parts), held, tokens, spare, (*notes, *parts_notes))


def _is_original(weights: Mapping[str, Tensor]) -> bool:
    return any(name.removeprefix("model.").startswith("midlayer.") for name in weights)


def _our_names(weights: Mapping[str, Tensor], fields: Fields) -> tuple[dict[str, Tensor], int]:
    """The weights by our names, and the number of layers."""
    held: dict[str, Tensor] = {}
    for name, weight in weights.items():
        ours = name.removeprefix("model.")
        for legacy, new in LEGACY_NAMES.items():
            ours = new + ours.removeprefix(legacy) if ours.startswith(legacy) else ours
        if ours in held:
            raise ValueError(f"two weights of the file are {ours}, one of them {name}")
        held[ours] = weight
    indices = {int(found[1]) for name in held if (found := re.match(r"layers\.(\d+)\.", name))}
    count, said = max(indices, default=0) + 1, fields.take("num_hidden_layers", int, None)
    if not _is_original(weights) and said not in (None, count):
        raise ValueError(f"config.json: num_hidden_layers is {said}, and the file has weights of {count} layers")
    return held, count


def _target_layers(fields: Fields, eagle: Fields, target: TargetShape) -> tuple[tuple[int, ...], str]:
    inner, outer = eagle.take(IDS, list, None), fields.take(IDS, list, None)
    if inner is None:
        return layer_ids(outer, 0, IDS, target)
    found = layer_ids(inner, 1, f"eagle_config.{IDS}", target)
    if outer is not None and outer != inner and tuple(outer) != found[0]:
        raise ValueError(f"{IDS} is {outer} in config.json and {inner} in its eagle_config: which of them counts?")
    return found


def _feature_norm(fields: Fields, eagle: Fields) -> str:
    each = [some.take(name, bool, False) for some in (fields, eagle) for name in ("fc_norm", "use_aux_norm")]
    whole = [some.take("norm_before_fc", bool, False) for some in (fields, eagle)]
    return feature_norm(fields.where, any(each), any(whole))


def _deeper_norms(held: dict[str, Tensor], count: int) -> tuple[str, dict[str, Tensor]]:
    """Which tensor norms what layers after the first read, under our name in `held` then; and the other ones."""
    pairs = [
        (f"layers.{index}.input_layernorm.weight", f"layers.{index}.hidden_norm.weight") for index in range(1, count)
    ]
    if not any(hidden in held for _, hidden in pairs):
        return "input_layernorm", {}
    spare = {ours: held[ours] for ours, _ in pairs if ours in held}
    for ours, hidden in pairs:
        if hidden in held:
            held[ours] = held.pop(hidden)
    return "hidden_norm", spare


def _mask_token(fields: Fields) -> int:
    for name in MASK_TOKENS:
        if name in fields:
            return fields.take(name, int)
    raise ValueError(f"the file has mask_hidden (P-EAGLE), and config.json none of the fields {', '.join(MASK_TOKENS)}")
