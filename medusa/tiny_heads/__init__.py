"""The trained heads that ship with the library, for the target of `specdec.load_tiny_pair()`, and their tree."""

from pathlib import Path

import torch

from medusa.calibration import load_tree
from medusa.drafter import MedusaDrafter
from medusa.heads import MedusaHeads
from specdec.model.runner import ModelRunner
from specdec.trees.tree import TokenTree

FOLDER = Path(__file__).parent


def load_tiny_heads(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[MedusaHeads, TokenTree]:
    """The heads and their calibrated tree; nothing is downloaded. Made by `python -m scripts.train_tiny_heads`.

    >>> heads, tree = load_tiny_heads()
    >>> heads.config.num_heads, tree.size
    (5, 26)
    """
    return MedusaHeads.from_pretrained(FOLDER, dtype).to(device), load_tree(FOLDER)


def tiny_drafter(target: ModelRunner) -> MedusaDrafter:
    """A drafter of the shipped heads for the shipped target: what `make demo` decodes with as `specdec medusa`.

    On a CPU, where verifying the calibrated tree takes four times as long as a plain step, it drafts one token."""
    heads, tree = load_tiny_heads(target.dtype, target.device)
    return MedusaDrafter(heads, TokenTree.chain(1) if target.device.type == "cpu" else tree)
