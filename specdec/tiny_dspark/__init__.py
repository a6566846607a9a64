"""The trained DSpark drafter that ships with the library, for the target of `specdec.load_tiny_pair()`."""

from pathlib import Path

import torch

from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.loading import load_block
from specdec.drafters.block.module import BlockModel
from specdec.model.runner import ModelRunner

FOLDER = Path(__file__).parent
NUM_TOKENS = 3  # what pays on a CPU; a GPU takes whole blocks, and trees


def load_tiny_dspark(target: ModelRunner, dtype: torch.dtype | None = None) -> BlockModel:
    """The network for the shipped target, whose embeddings and output layer it reads; nothing is downloaded.

    dtype: of its weights (None: the target's). Made by `python -m scripts.train_tiny_dspark`.

    >>> from specdec import ModelRunner, load_tiny_pair
    >>> load_tiny_dspark(ModelRunner(load_tiny_pair().target)).config.block_size
    6
    """
    return load_block(target, FOLDER, dtype=dtype)[0]


def tiny_drafter(target: ModelRunner) -> BlockDrafter:
    """A drafter of the shipped network for the shipped target: what `make demo` decodes with as `specdec dspark`."""
    return BlockDrafter(load_tiny_dspark(target), NUM_TOKENS)
