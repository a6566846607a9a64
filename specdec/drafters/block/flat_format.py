"""Block drafters with a flat Qwen3 config, of z-lab, DeepSpec, JetSpec, SpecForge (Domino) and NeMo; see `flat_kinds`.

Fields of the block lie at top level, in `dflash_config`, or in both. Ids are outputs of layers, -1 the embeddings.
Windows are counted as speculators trains them: from the anchor, for all places of a block."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.block.config import BlockConfig, require_layers
from specdec.drafters.block.flat_kinds import (
    NEMO,
    Either,
    architecture,
    is_domino,
    read_causal,
    read_heads,
    read_layers,
)
from specdec.drafters.block.reading import heads_note, require_reads, require_widths, slots_note
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


def read_flat(config: Mapping[str, Any], weights: Mapping[str, Tensor], target: TargetShape,
              ignore: Collection[str] = ()) -> Reading[BlockConfig]:  # fmt: skip
    """Read a config and weights as the libraries do that write them.

    ignore: unknown fields that are not errors. Raises ValueError naming a field or a weight that cannot be read."""
    fields = Fields(config, "config.json")
    block = fields.section("dflash_config")
    both, name = Either(fields, block), architecture(fields)
    domino = is_domino(both, name)
    refuse_quantised(fields)
    values = layer_fields(fields, True, 128)
    vocab, count, hidden = fields.take("vocab_size", int), fields.take("num_hidden_layers", int), values["hidden_size"]
    drafted, ids = both.take("draft_vocab_size", int, vocab), read_layers(both, name, count, target)
    states, states_note = layer_ids(ids, 1, "target_layer_ids", target)
    require_layers(states, target.num_layers)
    if (theirs := fields.take("num_target_layers", int, target.num_layers)) != target.num_layers:
        raise ValueError(f"num_target_layers is {theirs}, and {target.name} has {target.num_layers} layers")
    held = {_our_name(name): weight for name, weight in weights.items()}
    tokens = draft_vocabulary(drafted, vocab, held)
    (heads, why), (causal, causal_note) = read_heads(both, name, domino), read_causal(fields, block, name, count)
    own_embeddings, own_output = (f"{part}.weight" in held for part in ("embed_tokens", "lm_head"))
    values |= dict(
        target_vocab_size=vocab, draft_vocab_size=drafted, target_layers=states, num_layers=count,
        block_size=both.take("block_size", int), mask_token=both.take("mask_token_id", int),
        own_embeddings=own_embeddings, output="own" if own_output else "target", mlp_bias=False,
        windows=read_windows(fields, True, count), causal=causal, **heads,
    )  # fmt: skip
    if not domino:  # none of which the library of Domino reads
        values |= dict(
            embedding_scale=both.take("input_embedding_scale", float, 1.0),
            output_scale=both.take("output_multiplier", float, 1.0),
            softcap=both.take("final_logit_softcapping", float, 0.0) or None,
        )
    for unused, kind in (("tie_word_embeddings", bool), ("num_anchors", int)):
        both.take(unused, kind, None)
    if values["windows"] is not None and (domino or name == NEMO):
        raise ValueError(
            f"config.json: windows {values['windows']} of a {name} with projector_type "
            f"{'domino' if domino else 'dflash'} are counted from each place of a block, which is not read here"
        )
    for some in (fields, block):
        some.refuse_others(ignore)
    require_widths("config.json", hidden, not own_embeddings, not own_output, target)
    require_reads("config.json", len(states), hidden, held)
    whose = lambda own: "its own" if own else "the target's"
    notes = [
        f"format: flat Qwen3 config, {name}", states_note,
        slots_note(values["block_size"], values["from_anchor"], why), causal_note,
        f"embeddings: {whose(own_embeddings)}; output layer: {whose(own_output)}", heads_note(values),
    ]  # fmt: skip
    if values["windows"] is not None:
        notes.append(f"windows {values['windows']} before the anchor, for all places of a block")
    return Reading(BlockConfig(**values), held, tokens, notes=tuple(notes))


def _our_name(name: str) -> str:
    ours = name.removeprefix("model.").removeprefix("logit_head.")
    ours = f"domino_head.{ours}" if ours.startswith(("prefix_gru.", "embed_proj.")) else ours
    return ours.removesuffix(".weight") if "codebook" in ours else ours
