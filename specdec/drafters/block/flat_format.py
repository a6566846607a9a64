"""Block drafters with a flat Qwen3 config: z-lab's DFlash, DFlash2 and JetSpec, DeepSpec's DFlash and DSpark.

Fields of the block lie at top level, in `dflash_config`, or in both. Ids are outputs of layers, -1 the embeddings.
Windows are counted as speculators trains them: from the anchor, for all places of a block."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from specdec.drafters.block.config import BlockConfig, require_layers
from specdec.drafters.block.reading import heads_note, heads_of, require_reads, require_widths, selector_of, slots_note
from specdec.drafters.files.fields import REQUIRED, Fields
from specdec.drafters.files.reading import (
    Reading,
    TargetShape,
    draft_vocabulary,
    layer_fields,
    layer_ids,
    read_windows,
    refuse_quantised,
)

FROM_ANCHOR = {"DFlashDraftModel": False, "DFlash2DraftModel": False, "Qwen3DSparkModel": True}
"""The architectures, and whether place k of a block predicts the token after it."""


class Either:
    """Fields that lie at top level or in `dflash_config`."""

    def __init__(self, outer: Fields, inner: Fields):
        self._outer, self._inner = outer, inner

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The field `name`. Raises ValueError for two values of it, and as `Fields.take` does."""
        found = [some.take(name, kind) for some in (self._outer, self._inner) if name in some]
        if len(found) == 2 and found[0] != found[1]:
            raise ValueError(f"{name} is {found[0]!r} in {self._outer.where} and {found[1]!r} in {self._inner.where}")
        return found[0] if found else self._outer.take(name, kind, default)


def read_flat(config: Mapping[str, Any], weights: Mapping[str, Tensor], target: TargetShape,
              ignore: Collection[str] = ()) -> Reading[BlockConfig]:  # fmt: skip
    """Read a config and weights as the libraries do that write them.

    ignore: unknown fields that are not errors. Raises ValueError naming a field or a weight that cannot be read."""
    fields = Fields(config, "config.json")
    block = fields.section("dflash_config")
    both, name = Either(fields, block), _architecture(fields)
    refuse_quantised(fields)
    values = layer_fields(fields, True, 128)
    vocab, count, hidden = fields.take("vocab_size", int), fields.take("num_hidden_layers", int), values["hidden_size"]
    drafted, ids = both.take("draft_vocab_size", int, vocab), both.take("target_layer_ids", list)
    states, states_note = layer_ids(ids, 1, "target_layer_ids", target)
    require_layers(states, target.num_layers)
    if (theirs := fields.take("num_target_layers", int, target.num_layers)) != target.num_layers:
        raise ValueError(f"num_target_layers is {theirs}, and {target.name} has {target.num_layers} layers")
    held = {_our_name(name): weight for name, weight in weights.items()}
    tokens = draft_vocabulary(drafted, vocab, held)
    from_anchor = both.take("sample_from_anchor", bool, FROM_ANCHOR[name])
    own_embeddings, own_output = (f"{part}.weight" in held for part in ("embed_tokens", "lm_head"))
    values |= dict(
        target_vocab_size=vocab, draft_vocab_size=drafted, target_layers=states, num_layers=count,
        block_size=both.take("block_size", int), mask_token=both.take("mask_token_id", int), from_anchor=from_anchor,
        own_embeddings=own_embeddings, output="own" if own_output else "target", mlp_bias=False,
        windows=read_windows(fields, True, count), causal=_causal(fields, block, count),
        embedding_scale=both.take("input_embedding_scale", float, 1.0),
        output_scale=both.take("output_multiplier", float, 1.0),
        softcap=both.take("final_logit_softcapping", float, 0.0) or None, **_heads(both, name),
    )  # fmt: skip
    for unused, kind in (("tie_word_embeddings", bool), ("num_anchors", int), ("projector_type", str)):
        if unused == "projector_type":
            block.refuse(unused, "which is not read here", "dflash")
        both.take(unused, kind, None)
    for some in (fields, block):
        some.refuse_others(ignore)
    require_widths("config.json", hidden, not own_embeddings, not own_output, target)
    require_reads("config.json", len(states), hidden, held)
    whose = lambda own: "its own" if own else "the target's"
    notes = [
        f"format: flat Qwen3 config, {name}", states_note,
        slots_note(values["block_size"], from_anchor, "as this architecture has it"),
        f"embeddings: {whose(own_embeddings)}; output layer: {whose(own_output)}", heads_note(values),
    ]  # fmt: skip
    if values["windows"] is not None:
        notes.append(f"windows {values['windows']} before the anchor, for all places of a block")
    return Reading(BlockConfig(**values), held, tokens, notes=tuple(notes))


def _architecture(fields: Fields) -> str:
    """The one of `FROM_ANCHOR` that a file names. Raises ValueError for others."""
    names = fields.take("architectures", list)
    if len(names) != 1 or names[0] not in FROM_ANCHOR:
        raise ValueError(f"config.json: architectures must be one of {', '.join(FROM_ANCHOR)}, got {names!r}")
    if (kind := fields.take("model_type", str, "qwen3")) != "qwen3":
        raise ValueError(f"config.json: model_type must be 'qwen3', got {kind!r}")
    return names[0]


def _causal(fields: Fields, block: Fields, count: int) -> tuple[bool, ...] | None:
    """Which layers are causal in a block: what the file says of all, else those with a window."""
    said = fields.take("is_causal", bool, True if block.take("causal_head", bool, False) else None)
    if said is not None:
        return (said,) * count if said else None
    kinds = fields.take("layer_types", list, ["full_attention"] * count)
    causal = tuple(kind == "sliding_attention" for kind in kinds)
    return causal if any(causal) else None


def _our_name(name: str) -> str:
    ours = name.removeprefix("model.")
    return ours.removesuffix(".weight") if "codebook" in ours else ours


def _heads(both: Either, architecture: str) -> dict[str, Any]:
    if architecture == "DFlash2DraftModel":
        names = ("selector_rank", "selector_top_k", "conv_kernel_size", "conv_group_size")
        return selector_of(*(both.take(name, int) for name in names))
    rank, name = both.take("markov_rank", int, 0), both.take("markov_head_type", str, "vanilla")
    confident = both.take("enable_confidence_head", bool, False)
    return heads_of(rank, name, confident, both.take("confidence_head_with_markov", bool, False))
