"""EAGLE-3 drafters to files: in the format of the speculators library, which vLLM reads, or in SGLang's."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.eagle3.config import Eagle3Config
from specdec.drafters.eagle3.module import Eagle3Model

LAYOUTS = ("speculators", "sglang")
SPECULATORS_VERSION = "0.9.0"  # whose fields are written


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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    held = {name: weight.detach().contiguous().cpu() for name, weight in weights.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def _weights(model: Eagle3Model) -> dict[str, Tensor]:
    """The module's weights and its vocabulary map as `d2t` and `t2d`."""
    held = model.state_dict()
    tokens = held.pop("draft_tokens", None)
    if tokens is not None:
        tokens = tokens.cpu()
        held["d2t"] = tokens - torch.arange(len(tokens))
        held["t2d"] = torch.zeros(model.config.target_vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
    return held


def _layer_config(config: Eagle3Config, model_type: str) -> dict[str, Any]:
    """The fields that transformers' Llama and Qwen3 have too."""
    rotation = dict(config.rotation.parameters)
    rotation["rope_type"] = config.rotation.kind
    return dict(
        model_type=model_type,
        vocab_size=config.target_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_act=config.activation,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        max_position_embeddings=config.rotation.max_positions,
        rope_parameters=rotation,
        tie_word_embeddings=False,
    )


def _refuse(config: Eagle3Config, layout: str, allowed: dict[str, Any]) -> None:
    for name, value in allowed.items():
        if getattr(config, name) != value:
            raise ValueError(f"the {layout} layout has no {name} other than {value}, got {getattr(config, name)}")


def _speculators(model: Eagle3Model, num_tokens: int, target: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, weights = model.config, _weights(model)
    layers = "qwen3" if config.qk_norm else "llama"
    _refuse(config, "speculators", dict(fusion_bias=False) | (dict(mlp_bias=False) if config.qk_norm else {}))
    if config.draft_vocab_size == config.target_vocab_size and "d2t" in weights:
        raise ValueError("the speculators layout has no map for a draft vocabulary of all tokens, got draft_tokens")
    if config.output == "embeddings":
        if not config.own_embeddings:
            raise ValueError(
                'the speculators layout has no output layer that is the target\'s embeddings, got "embeddings"'
            )
        weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
    inner = _layer_config(config, layers)
    if layers == "llama":
        inner["mlp_bias"] = config.mlp_bias
    if config.windows is not None:
        kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        sizes = {window for window in config.windows if window is not None}
        if len(sizes) > 1:
            raise ValueError(f"the speculators layout has one window for all layers, got {config.windows}")
        inner |= dict(layer_types=kinds, sliding_window=max(sizes, default=None), use_sliding_window=bool(sizes))
    kind = "peagle" if config.parallel else "eagle3"
    proposal = dict(proposal_type="greedy", speculative_tokens=num_tokens, accept_tolerance=0.0, verifier_accept_k=1)
    outer = dict(
        architectures=["PEagleDraftModel" if config.parallel else "Eagle3DraftModel"],
        speculators_model_type=kind,
        speculators_version=SPECULATORS_VERSION,
        speculators_config=dict(
            algorithm=kind,
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=dict(name_or_path=target or None, architectures=[]),
        ),
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
    _refuse(config, "sglang", plain | dict(mask_token=None))
    weights = {_sglang_name(name, config.num_layers): weight for name, weight in _weights(model).items()}
    for layer in range(1, config.num_layers):  # SGLang reads the one, vLLM the other
        weights[f"layers.{layer}.hidden_norm.weight"] = weights[f"layers.{layer}.input_layernorm.weight"].clone()
    flat = _layer_config(config, "llama")
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
