"""A target 512 wide, trained on the spot: all of its layers divide into groups of 128, the shipped target's do not."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

import specdec
from scripts.common.tiny_corpus import load_corpus
from scripts.common.tiny_models import build_model, tokenize
from scripts.medusa_bench.models import trained

SHAPE = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)
PRESETS = {  # steps of `batch` rows of `context` tokens
    "full": dict(context=128, target_batch=16, target_steps=500, target_lr=2e-3, target=SHAPE),
    "smoke": dict(context=32, target_batch=2, target_steps=3, target_lr=2e-3, target=SHAPE),
}


@dataclass(frozen=True, slots=True)
class Streams:
    """Token streams of the standard library's source: of files to train on, and of those held out."""

    train: np.ndarray
    held_out: np.ndarray


def read_streams(tokenizer: PreTrainedTokenizerBase, every: int = 1) -> Streams:
    """The streams of this Python's own source, of every so many files."""
    files, held_out = load_corpus()
    return Streams(*(tokenize([text for _, text in part[::every]], tokenizer) for part in (files, held_out)))


def wide_target(folder: Path, streams: Streams, tokenizer: PreTrainedTokenizerBase, preset: str = "full") -> Path:
    """Train the target, or go on with a run that was cut; returns `folder`/target, a checkpoint in bf16.

    On one core about six minutes, with products in bf16."""
    settings, out = PRESETS[preset], folder / "target"
    if (out / "config.json").is_file():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(settings["target"], len(tokenizer), 1024, seed=0)

    def loss_on(x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(x, labels=x, use_cache=False).loss

    trained("target", model, loss_on, streams.train, streams.held_out, settings, folder, [0, 1], log_every=50)
    tokenizer.save_pretrained(out)
    return out


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the shipped pair, whose draft model so drafts for the wide target too."""
    return specdec.load_tiny_pair().tokenizer
