"""The trained EAGLE-3 drafter that ships with the library, for the target of `specdec.load_tiny_pair()`."""

from pathlib import Path

import torch

from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.model.runner import ModelRunner

FOLDER = Path(__file__).parent
NUM_TOKENS = 2  # what pays on a CPU; a GPU takes longer chains, and trees


def load_tiny_eagle3(target: ModelRunner, dtype: torch.dtype | None = None) -> Eagle3Model:
    """The network for the shipped target, whose embeddings it reads; nothing is downloaded.

    dtype: of its weights (None: the target's). Made by `python -m scripts.train_tiny_eagle3`.

    >>> from specdec import ModelRunner, load_tiny_pair
    >>> load_tiny_eagle3(ModelRunner(load_tiny_pair().target)).config.target_layers
    (2, 10, 17)
    """
    return load_eagle3(target, FOLDER, dtype=dtype)[0]


def tiny_drafter(target: ModelRunner) -> Eagle3Drafter:
    """A drafter of the shipped network for the shipped target: what `make demo` decodes with as `specdec eagle3`."""
    return Eagle3Drafter(load_tiny_eagle3(target), NUM_TOKENS)
