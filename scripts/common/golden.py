"""Folders with tiny random drafters that another library has written, and what its own classes make of them."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MARGIN = 0.02  # of the best logit before the second, so that drafted tokens are clear
VERIFIER = "verifier"  # a folder where this runs: the library reads a config and weights that no result depends on
SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
             head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=64)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of drafter: how the library makes one, and `run(model, seed)`, inputs and logits of its own forward.

    Logits are `[..., V_draft]` under the key "logits". read: `read(type, folder)`, what the library reads again, in
    float64 (None: as speculators does). mapped: whether it may have a vocabulary of its own."""

    new_model: Callable[[], Any]
    run: Callable[[Any, int], dict[str, Tensor]]
    read: Callable[[Any, Path], Any] | None = None
    mapped: bool = True


def write_all(about: str | None, kinds: Mapping[str, Kind]) -> None:
    """The command of a script: write all kinds into the folder that it is given."""
    options = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    options.add_argument("output", type=Path, metavar="DIR")
    output = options.parse_args().output.absolute()
    with TemporaryDirectory() as here:
        os.chdir(here)
        save_verifier()
        for name, kind in kinds.items():
            make(name, kind, output / name)


def make(name: str, kind: Kind, folder: Path) -> None:
    """Write the drafter `name` and what it computes, with the first seed whose drafts are clear."""
    for seed in range(1000):
        torch.manual_seed(seed)
        model = kind.new_model()
        randomise(model, kind.mapped)
        model.to(torch.bfloat16).save_pretrained(folder)
        expected = kind.run((kind.read or saved_model)(type(model), folder), seed)
        best = expected["logits"].topk(2, -1).values
        if (best[..., 0] - best[..., 1]).min() > MARGIN:
            break
    (folder / "config.py").unlink(missing_ok=True)  # the library's source of its config class
    save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    print(json.dumps(dict(name=name, seed=seed, kB=sum(file.stat().st_size for file in folder.iterdir()) // 1024)))


def saved_model(make_model, folder: Path):
    """What the library reads from a folder, in float64 and with dense attention."""
    config = make_model.config_class.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return make_model.from_pretrained(folder, config=config).double().eval()


def randomise(model, mapped: bool = True) -> None:
    """Weights that matter: norms around 1, matrices that keep the scale of what they read; `mapped`: and a random
    vocabulary, if it has one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif weight.ndim == 1 or "embed" in name or "mask_hidden" in name:
                weight.copy_(torch.randn_like(weight))
            else:
                weight.copy_(1.5 * torch.randn_like(weight) / weight.shape[1] ** 0.5)
    if mapped and model.use_draft_vocab:
        tokens = torch.randperm(model.verifier_vocab_size)[: model.draft_vocab_size].sort().values
        mask = torch.zeros(model.verifier_vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
        model.load_vocab_mappings(mask, tokens - torch.arange(len(tokens)))


def save_verifier() -> None:
    """A random target of the drafters' sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=8)).to(torch.bfloat16).save_pretrained(VERIFIER)
