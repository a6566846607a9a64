"""The trained pair that ships with the library: a target of 7.7 M parameters and a draft distilled from it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specdec.loading import load_model

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class TinyPair:
    """The pair, its tokenizer and what belongs to it.

    prompts: `prompts[kind]`, held-out texts of the kinds "code", "prose", "data" and "editing".
    record: of the training.
    """

    target: "PreTrainedModel"
    draft: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompts: dict[str, list[str]]
    record: dict


def load_tiny_pair(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TinyPair:
    """Load the shipped pair, without any download.

    `python -m scripts.train_tiny_pair` trained it on the Python standard library.

    >>> sorted(load_tiny_pair().prompts)
    ['code', 'data', 'editing', 'prose']
    """
    from transformers import AutoTokenizer  # takes seconds

    prompts = json.loads((FOLDER / "prompts.json").read_text())
    return TinyPair(
        target=load_model(FOLDER / "target", dtype, device),
        draft=load_model(FOLDER / "draft", dtype, device),
        tokenizer=AutoTokenizer.from_pretrained(FOLDER / "target"),
        prompts={kind: [entry["text"] for entry in entries] for kind, entries in prompts.items()},
        record=json.loads((FOLDER / "record.json").read_text()),
    )
