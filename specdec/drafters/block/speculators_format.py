"""Block drafters in the format of the speculators library, kinds "dflash", "dflash2" and "dspark" (0.9.0)."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.block.config import BlockConfig, require_layers
from specdec.drafters.block.reading import heads_note, heads_of, require_reads, require_widths, selector_of, slots_note
from specdec.drafters.files.fields import Fields
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

KINDS = ("dflash", "dspark", "dflash2")
IDS = "aux_hidden_state_layer_ids"


def read_speculators(config: Mapping[str, Any], weights: Mapping[str, Tensor], target: TargetShape,
                     ignore: Collection[str] = ()) -> Reading[BlockConfig]:  # fmt: skip
    """Read a config and weights by the rules of the library that writes them.

    ignore: unknown fields that are not errors. Raises ValueError naming a field that is missing or cannot be read."""
    fields, inner, kind, layers = open_config(config, KINDS)
    # layers are those of Qwen3, also for "llama", which has no windows that a field switches off
    values = layer_fields(inner, True, 128 if layers == "qwen3" else None) | dict(mlp_bias=False)
    vocab, count, hidden = inner.take("vocab_size", int), inner.take("num_hidden_layers", int), values["hidden_size"]
    drafted = fields.take("draft_vocab_size", int)
    states, states_note = layer_ids(fields.take(IDS, list), 0, IDS, target)
    require_layers(states, target.num_layers)
    if (width := fields.take("target_hidden_size", int, hidden)) != hidden:
        raise ValueError(f"config.json: target_hidden_size is {width} and hidden_size {hidden}, which must be the same")
    held, notes = dict(weights), [f"format: speculators, {kind}, {layers} layers with norms of q and k", states_note]
    tokens = draft_vocabulary(drafted, vocab, held)
    windows = read_windows(inner, layers == "qwen3", count)
    causal = None if fields.take("sliding_window_non_causal", bool, kind == "dflash2") else windows
    from_anchor = fields.take("sample_from_anchor", bool, kind == "dspark")
    values |= dict(
        target_vocab_size=vocab, draft_vocab_size=drafted, target_layers=states, num_layers=count,
        block_size=fields.take("block_size", int), mask_token=fields.take("mask_token_id", int), windows=windows,
        causal=causal and tuple(window is not None for window in causal), from_anchor=from_anchor,
        output="target" if drafted == vocab else "own", **_heads(fields, kind),
    )  # fmt: skip
    num_tokens = proposed_tokens(fields, kind)
    fields.take("speculators_version", str, "")
    for some in (fields, inner):
        some.refuse_others(ignore)
    for name, is_theirs in (("embed_tokens.weight", True), ("lm_head.weight", drafted == vocab)):
        if is_theirs and held.pop(name, None) is not None:
            notes.append(f"{name} of the file is not used: the library takes the target's")
    require_widths("config.json", hidden, True, drafted == vocab, target)
    require_reads("config.json", len(states), hidden, held)
    notes.append(slots_note(values["block_size"], from_anchor, f"sample_from_anchor {from_anchor}"))
    if windows is not None:
        notes.append(f"windows {windows} before the anchor; such layers are causal in a block: {causal is not None}")
    return Reading(BlockConfig(**values), held, tokens, notes=(*notes, heads_note(values)), num_tokens=num_tokens)


def _heads(fields: Fields, kind: str) -> dict[str, Any]:
    if kind == "dflash":
        return heads_of(0, "none", False, False)
    if kind == "dflash2":
        defaults = dict(selector_rank=256, selector_top_k=16, conv_kernel_size=2, conv_group_size=16)
        return selector_of(*(fields.take(name, int, value) for name, value in defaults.items()))
    rank, name = fields.take("markov_rank", int, 256), fields.take("markov_head_type", str, "vanilla")
    confident = fields.take("enable_confidence_head", bool, True)
    return heads_of(rank, name, confident, fields.take("confidence_head_with_markov", bool, True))
