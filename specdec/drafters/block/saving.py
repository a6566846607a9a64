"""Block drafters to files: in the format of the speculators library, which vLLM reads, or with a flat config."""

from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.drafters.block.module import BlockModel
from specdec.drafters.files.writing import (
    SPECULATORS_VERSION,
    layer_config,
    proposal,
    refuse_other,
    window_fields,
    with_vocabulary,
    write_drafter,
)

LAYOUTS = ("speculators", "z-lab")
ARCHITECTURES = dict(dflash="DFlashDraftModel", dspark="DSparkDraftModel", dflash2="DFlash2DraftModel")
Z_LAB: dict[str, dict[str, Any]] = {  # what an architecture of that layout cannot have otherwise
    "DFlashDraftModel": dict(markov="none", confidence="none", conv_taps=0),
    "DFlash2DraftModel": {},
    "Qwen3DSparkModel": dict(candidates=0, conv_taps=0),
    "DominoDraftModel": dict(confidence="none", conv_taps=0, windows=None, own_embeddings=False, output="target",
                             embedding_scale=1.0, output_scale=1.0, softcap=None),
}  # fmt: skip
PLAIN = dict(qk_norm=True, mlp_bias=False)  # what all layouts have


def save_drafter(model: BlockModel, folder: str | Path, layout: str = "speculators", num_tokens: int | None = None,
                 target: str = "", num_target_layers: int | None = None) -> None:  # fmt: skip
    """Write config.json and model.safetensors, from which `specdec.load_drafter` reads the same drafter again.

    layout: "speculators", or "z-lab", a flat config: of DeepSpec's with a Markov head, SpecForge's with Domino's head.
    num_tokens: how many it drafts by default (None: all that a block predicts).
    target: name or path of the model that it drafts for, which other libraries load what it lacks from.
    num_target_layers: of that model; the layout "z-lab" names it.

    Raises ValueError for another layout, and for what a layout cannot express, naming it."""
    made = _made(model, layout, num_tokens, target, num_target_layers)
    write_drafter(folder, *made, next(model.parameters()).dtype)


def require_layout(model: BlockModel, layout: str, num_target_layers: int | None = None) -> None:
    """Raise ValueError for what `save_drafter` refuses, before there is anything to save."""
    _made(model, layout, None, "", num_target_layers)


def _made(model: BlockModel, layout: str, num_tokens: int | None, target: str,
          num_target_layers: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """The config and the weights of a file."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    tokens = model.config.num_slots if num_tokens is None else num_tokens
    refuse_other(model.config, layout, PLAIN)
    return _speculators(model, tokens, target) if layout == "speculators" else _z_lab(model, num_target_layers)


def _speculators(model: BlockModel, num_tokens: int, target: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, weights = model.config, with_vocabulary(model.state_dict(), model.config.target_vocab_size)
    whole = config.draft_vocab_size == config.target_vocab_size
    if config.markov == "domino":
        raise ValueError("the speculators layout has no domino head, got markov 'domino': layout 'z-lab' has one")
    allowed = dict(own_embeddings=False, output="target" if whole else "own")
    refuse_other(config, "speculators", allowed | dict(embedding_scale=1.0, output_scale=1.0, softcap=None))
    if whole and "d2t" in weights:
        raise ValueError("the speculators layout has no map for a draft vocabulary of all tokens, got draft_tokens")
    windowed = tuple(window is not None for window in config.windows or ())
    if config.causal is not None and any(config.causal) and config.causal != windowed:
        raise ValueError(
            f"the speculators layout has causal {windowed} or none with these windows, got {config.causal}"
        )
    kind = "dflash" if config.markov == config.confidence == "none" else "dspark"
    kind = "dflash2" if config.markov == "selector" else kind
    if (kind == "dflash2") != bool(config.conv_taps):
        raise ValueError(f"the speculators layout has convolutions beside a selector, got {config.conv_taps} taps")
    outer = dict(
        architectures=[ARCHITECTURES[kind]],
        speculators_model_type=kind,
        speculators_version=SPECULATORS_VERSION,
        speculators_config=proposal(kind, num_tokens, target),
        transformer_layer_config=layer_config(config, "qwen3") | window_fields(config.windows),
        draft_vocab_size=config.draft_vocab_size,
        block_size=config.block_size,
        target_hidden_size=config.hidden_size,
        aux_hidden_state_layer_ids=list(config.target_layers),
        mask_token_id=config.mask_token,
        sliding_window_non_causal=not any(config.causal or ()),
        sample_from_anchor=config.from_anchor,
        tie_word_embeddings=False,
    )
    return outer | ({} if kind == "dflash" else _head_fields(model)), weights


def _z_lab(model: BlockModel, num_target_layers: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = model.config
    if num_target_layers is None:
        raise ValueError("the z-lab layout names the target's number of layers: num_target_layers is None")
    name = "DFlash2DraftModel" if config.markov == "selector" else "DFlashDraftModel"
    name = "Qwen3DSparkModel" if config.from_anchor else name
    name = "DominoDraftModel" if config.markov == "domino" else name
    refuse_other(config, "z-lab", {"draft_vocab_size": config.target_vocab_size} | Z_LAB[name])
    each = {*(config.causal or (False,))}
    if len(each) > 1 and config.causal != tuple(window is not None for window in config.windows or ()):
        raise ValueError(f"the z-lab layout has causal all, none or the layers with windows, got {config.causal}")
    flat = layer_config(config, "qwen3") | window_fields(config.windows)
    ids = [layer - 1 for layer in config.target_layers]
    flat |= dict(
        architectures=[name],
        num_target_layers=num_target_layers,
        is_causal=each.pop() if len(each) == 1 else None,
        block_size=config.block_size,
    )
    block = dict(mask_token_id=config.mask_token, target_layer_ids=ids)
    scales = dict(input_embedding_scale=config.embedding_scale, output_multiplier=config.output_scale,
                  final_logit_softcapping=config.softcap)  # fmt: skip
    plain = dict(input_embedding_scale=1.0, output_multiplier=1.0, final_logit_softcapping=None)
    block |= {name: value for name, value in scales.items() if value != plain[name]}
    weights = with_vocabulary(model.state_dict(), config.target_vocab_size)
    if name == "Qwen3DSparkModel":
        return flat | block | _head_fields(model), weights
    block |= _head_fields(model) if config.markov in ("selector", "domino") else {}
    weights = {part.removeprefix("domino_head."): weight for part, weight in weights.items()}
    return flat | dict(dflash_config=block), weights


def _head_fields(model: BlockModel) -> dict[str, Any]:
    config = model.config
    if config.markov == "selector":
        return dict(
            selector_rank=config.markov_rank,
            selector_top_k=config.candidates,
            conv_kernel_size=config.conv_taps,
            conv_group_size=config.conv_group,
        )
    if config.markov == "domino":
        return dict(
            projector_type="domino",
            emb_dim=config.markov_rank,
            gru_hidden_dim=config.memory_size,
            pure_draft_prefix_len=config.plain_slots,
            shift_label=config.from_anchor,
        )
    return dict(
        markov_rank=config.markov_rank,
        markov_head_type="vanilla" if config.markov == "none" else config.markov,
        enable_confidence_head=config.confidence != "none",
        confidence_head_with_markov=config.confidence == "markov",
    )
