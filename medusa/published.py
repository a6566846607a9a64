"""Heads from files as our config and our weights, whichever layout they were published in."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa.base_model import FLOATS
from medusa.config import MedusaConfig
from medusa.files import find_files
from medusa.layouts import SHARED_OUTPUT, TOKEN_MAP, find_layout, renamed

OURS = ("num_heads", "num_layers")
NEVER = -1e4  # the output bias of a token that a truncated vocabulary lacks; float16 has it too


def read_heads(name: str | Path) -> tuple[MedusaConfig, dict[str, Tensor], Path]:
    """The config and weights of the heads in a folder or on the hub, and the folder where they lie.

    Of a whole model only the heads are read. Raises FileNotFoundError for a folder without config or weights,
    ValueError for a damaged file, an unknown layout or quantised heads."""
    files = find_files(name)
    given, folder = files.config, files.folder
    layout = find_layout(files.weights, str(folder))
    ours = "format" in given
    heads, layers = _counts((OURS,) if ours else layout.counts, given)
    weights = files.read(renamed(layout, files.weights, layers, files.whole, str(folder)))
    for key, weight in weights.items():
        if key != TOKEN_MAP and weight.dtype not in FLOATS:
            raise ValueError(f"weight {key} in {folder} is {weight.dtype}: quantised heads are not read")
    if ours:
        fields = MedusaConfig.__dataclass_fields__
        return MedusaConfig(**{field: given[field] for field in fields if field in given}), weights, folder
    if layout.counts_heads:
        weights = _as_vllm_reads(weights, given, heads, layers)
    else:  # published configs sometimes promise fewer heads than their weights hold
        heads = 1 + max(int(key.split(".")[0]) for key in weights)
    first = f"0.{layers}.weight"
    if first not in weights:
        raise ValueError(f"the heads in {folder} lack the weight {first}")
    vocab, hidden = weights[first].shape
    if layout.counts_heads:
        vocab, hidden = given.get("vocab_size") or vocab, given.get("hidden_size") or hidden
    model = str(name) if files.whole and layout.in_model else ""  # whose heads these are, if the config does not say
    config = MedusaConfig(
        heads, layers, hidden, vocab, base_model=given.get("base_model_name_or_path") or model,
        bias=f"0.{layers}.bias" in weights, logit_scale=given.get("logit_scale", 1.0) if layout.counts_heads else 1.0,
    )  # fmt: skip
    return config, weights, folder


def _counts(paths: tuple[tuple[str, str], ...], given: dict) -> tuple[int, int]:
    """The numbers of heads and of blocks that a config gives, at the first of `paths` that it has."""

    def value(path: str) -> Any:
        found: Any = given
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    for heads, layers in paths:
        if value(heads) is not None and value(layers) is not None:
            return value(heads), value(layers)
    raise ValueError(f"the config lacks {', '.join(path for path in paths[0] if value(path) is None)}")


def _as_vllm_reads(weights: dict[str, Tensor], given: dict, heads: int, layers: int) -> dict[str, Tensor]:
    """vLLM's heads in full: a shared output layer, a truncated vocabulary and absent biases are spelled out."""
    token_map, shared, first = weights.get(TOKEN_MAP), weights.get(SHARED_OUTPUT), weights.get(f"0.{layers}.weight")
    if given.get("original_lm_head") or first is None:
        shared = shared if first is None else first
        weights |= {} if shared is None else {f"{head}.{layers}.weight": shared for head in range(heads)}
    weights = {key: weight for key, weight in weights.items() if key.split(".")[0] in map(str, range(heads))}
    blocks = [key for key in weights if key.endswith("linear.weight")]
    if not any(key.endswith("linear.bias") for key in weights):
        weights |= {key.replace("weight", "bias"): weights[key].new_zeros(len(weights[key])) for key in blocks}
    vocab = given.get("vocab_size") or given.get("truncated_vocab_size")
    kept = given.get("truncated_vocab_size") or vocab
    if vocab is None or kept is None or kept == vocab:  # then vLLM reads no token map either
        return weights
    if token_map is None:
        raise ValueError(f"the config's truncated_vocab_size is {kept} of {vocab}, and the weights have no {TOKEN_MAP}")
    outputs = {key: weights[key] for head in range(heads) if (key := f"{head}.{layers}.weight") in weights}
    return weights | _over_all_tokens(outputs, token_map, kept, vocab)


def _over_all_tokens(outputs: dict[str, Tensor], token_map: Tensor, kept: int, vocab: int) -> dict[str, Tensor]:
    """Output layers over all `vocab` tokens: what `token_map [kept]` lacks gets weights of zero and the bias NEVER."""
    tokens = token_map.long()
    inside = tokens.shape == (kept,) and bool(((tokens >= 0) & (tokens < vocab)).all())
    if token_map.is_floating_point() or not inside or len(tokens.unique()) != kept:
        raise ValueError(
            f"{TOKEN_MAP} must hold {kept} different tokens below {vocab}, got {token_map.dtype} "
            f"{list(token_map.shape)} with {len(tokens.unique())} different ones"
        )
    whole = dict[str, Tensor]()
    for key, weight in outputs.items():
        rows = weight[tokens] if len(weight) == vocab else weight
        if len(rows) != kept:
            raise ValueError(f"weight {key} has {len(weight)} rows for a vocabulary of {vocab} truncated to {kept}")
        whole[key] = torch.zeros(vocab, rows.shape[1], dtype=rows.dtype).index_copy(0, tokens, rows)
        bias = torch.full((vocab,), NEVER, dtype=rows.dtype).index_fill(0, tokens, 0.0)
        whole[key.replace("weight", "bias")] = bias
    return whole
