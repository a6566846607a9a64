"""What all files of drafters have in common that we write: config.json, model.safetensors, layers, vocabulary maps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.network.parts import LayerSizes
from specdec.drafters.network.rotation import Rotation

SPECULATORS_VERSION = "0.9.0"  # whose fields are written


class LayerFields(LayerSizes, Protocol):
    """The fields of a drafter's config that describe its decoder layers in files."""

    @property
    def target_vocab_size(self) -> int:
        """V, of the target."""

    @property
    def num_layers(self) -> int:
        """Layers of its own."""

    @property
    def rotation(self) -> Rotation:
        """Its rotary positions."""


def layer_config(config: LayerFields, model_type: str) -> dict[str, Any]:
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


def window_fields(windows: tuple[int | None, ...] | None) -> dict[str, Any]:
    """The fields for the windows of layers. Raises ValueError for windows of several sizes."""
    if windows is None:
        return {}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise ValueError(f"a drafter's file has one window for all layers, got {windows}")
    return dict(layer_types=kinds, sliding_window=max(sizes, default=None), use_sliding_window=bool(sizes))


def refuse_other(config: object, layout: str, allowed: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of `config` with another value than the one that a layout allows."""
    for name, value in allowed.items():
        if getattr(config, name) != value:
            raise ValueError(f"the {layout} layout has no {name} other than {value}, got {getattr(config, name)}")


def with_vocabulary(weights: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Weights of a network with its `draft_tokens` as `d2t` and `t2d`, out of a target's `vocab_size` tokens."""
    held = dict(weights)
    tokens = held.pop("draft_tokens", None)
    if tokens is not None:
        tokens = tokens.cpu()
        held["d2t"] = tokens - torch.arange(len(tokens))
        held["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
    return held


def proposal(kind: str, num_tokens: int, target: str) -> dict[str, Any]:
    """The field `speculators_config`: how many tokens are drafted by default, and for which target."""
    method = dict(proposal_type="greedy", speculative_tokens=num_tokens, accept_tolerance=0.0, verifier_accept_k=1)
    return dict(
        algorithm=kind,
        proposal_methods=[method],
        default_proposal_method="greedy",
        verifier=dict(name_or_path=target or None, architectures=[]),
    )


def write_drafter(folder: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor],
                  dtype: torch.dtype) -> None:  # fmt: skip
    """Write config.json and model.safetensors; `dtype` is said in the config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"dtype": str(dtype).removeprefix("torch."), **config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    held = {name: weight.detach().contiguous().cpu() for name, weight in weights.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
