"""EAGLE-3 drafters to files: in the format of the speculators library, which vLLM reads, or in SGLang's."""

from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.files.writing import (
    SPECULATORS_VERSION,
    layer_config,
    proposal,
    refuse_other,
    window_fields,
    with_vocabulary,
    write_drafter,
)

LAYOUTS = ("speculators", "sglang")


def save_drafter(model: Eagle3Model, folder: str | Path, layout: str = "speculators", num_tokens: int = 5,
                 target: str = "") -> None:  # fmt: skip
    """Write config.json and model.safetensors, from which `specdec.load_drafter` reads the same drafter again.

    num_tokens: how many it drafts by default.
    target: name or path of the model that it drafts for, which other libraries load what it lacks from.

    Raises ValueError for another layout, and for what a layout cannot express, naming it."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    write = _speculators if layout == "speculators" else _sglang
    config, weights = write(model, num_tokens, target)
    write_drafter(folder, config, weights, next(model.parameters()).dtype)


def _speculators(model: Eagle3Model, num_tokens: int, target: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = model.config
    weights = with_vocabulary(model.state_dict(), config.target_vocab_size)
    layers = "qwen3" if config.qk_norm else "llama"
    refuse_other(config, "speculators", dict(fusion_bias=False) | (dict(mlp_bias=False) if config.qk_norm else {}))
    if config.draft_vocab_size == config.target_vocab_size and "d2t" in weights:
        raise ValueError("the speculators layout has no map for a draft vocabulary of all tokens, got draft_tokens")
    if config.output == "embeddings":
        if not config.own_embeddings:
            raise ValueError(
                'the speculators layout has no output layer that is the target\'s embeddings, got "embeddings"'
            )
        weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
    inner = layer_config(config, layers)
    if layers == "llama":
        inner["mlp_bias"] = config.mlp_bias
    inner |= window_fields(config.windows)
    kind = "peagle" if config.parallel else "eagle3"
    outer = dict(
        architectures=["PEagleDraftModel" if config.parallel else "Eagle3DraftModel"],
        speculators_model_type=kind,
        speculators_version=SPECULATORS_VERSION,
        speculators_config=proposal(kind, num_tokens, target),
        transformer_layer_config=inner,
        draft_vocab_size=config.draft_vocab_size,
        target_hidden_size=config.target_hidden_size,
        eagle_aux_hidden_state_layer_ids=list(config.target_layers),
        norm_before_residual=config.norm_before_residual,
        norm_before_fc=config.feature_norm == "whole",
        fc_norm=config.feature_norm == "each",
        norm_output=config.norm_output,
        embed_requires_grad=config.parallel,
        tie_word_embeddings=False,
    )
    return outer | (dict(mask_token_id=config.mask_token) if config.parallel else {}), weights


def _sglang(model: Eagle3Model, num_tokens: int, target: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = model.config
    plain = dict(qk_norm=False, attention_bias=False, mlp_bias=False, norm_before_residual=False, windows=None)
    refuse_other(config, "sglang", plain | dict(mask_token=None))
    held = with_vocabulary(model.state_dict(), config.target_vocab_size)
    weights = {_sglang_name(name, config.num_layers): weight for name, weight in held.items()}
    for layer in range(1, config.num_layers):  # SGLang reads the one, vLLM the other
        weights[f"layers.{layer}.hidden_norm.weight"] = weights[f"layers.{layer}.input_layernorm.weight"].clone()
    flat = layer_config(config, "llama")
    rotation = flat["rope_parameters"]
    scaling = {name: value for name, value in rotation.items() if name != "rope_theta"}
    flat |= dict(
        architectures=["LlamaForCausalLMEagle3"],
        mlp_bias=False,
        bias=config.fusion_bias,
        rope_theta=rotation["rope_theta"],
        rope_scaling=None if config.rotation.kind == "default" else scaling,
        tie_word_embeddings=config.output == "embeddings",
        draft_vocab_size=None if config.output == "target" else config.draft_vocab_size,
        target_hidden_size=config.target_hidden_size,
        num_aux_hidden_states=len(config.target_layers),
        fc_norm=config.feature_norm == "each",
        norm_output=config.norm_output,
        eagle_config=dict(
            eagle_aux_hidden_state_layer_ids=[layer - 1 for layer in config.target_layers],
            use_aux_hidden_state=True,
            norm_before_fc=config.feature_norm == "whole",
        ),
    )
    return flat, weights


def _sglang_name(name: str, layers: int) -> str:
    return name.replace("layers.0.", "midlayer.", 1) if layers == 1 and name.startswith("layers.0.") else name
