"""Train the EAGLE-3 drafter that ships with the library: self-distilled, measured on held-out prompts.

    python -m scripts.train_tiny_eagle3 --output runs/tiny_eagle3                  # twenty minutes on one core
    python -m scripts.train_tiny_eagle3 --output runs/tiny_eagle3 --preset full    # on one GPU
    python -m scripts.train_tiny_eagle3 --output runs/smoke --preset smoke         # checks the path, not the drafter

The target continues pieces of the Python standard library, greedily and at another temperature; the drafter learns from
its text (`scripts.train_eagle3`), at the end from its greedy text after whole prompts, which is harder to guess. Then
the shipped prompts, which were in neither, are decoded greedily with it, with the shipped Medusa heads and with the
shipped draft model. The figures go to record.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import specdec
from medusa import MedusaDrafter
from medusa.tiny_heads import load_tiny_heads
from scripts import train_eagle3
from scripts.common.entry import run_script
from scripts.common.tiny_training import PRESETS, TinyTraining, options_of
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.saving import save_drafter
from specdec.trees.tree import TokenTree

DEPTH = {"full": 5, "cpu": 3, "smoke": 2}
NUM_TOKENS, DRAFT_VOCABULARY, INTERMEDIATE = 5, 3072, 768
SEVERAL = TokenTree.from_widths((5, 2, 1))


def drafters(target: specdec.ModelRunner, drafter: Path, draft) -> dict[str, specdec.Drafter]:
    """What is measured beside each other, by name."""
    network, _ = load_eagle3(target, drafter)
    heads, tree = load_tiny_heads(target.dtype, target.device)
    return {
        f"EAGLE-3, chain of {NUM_TOKENS}": Eagle3Drafter(network, NUM_TOKENS),
        f"EAGLE-3, tree of {SEVERAL.size} nodes": Eagle3Drafter(network, tree=SEVERAL),
        "EAGLE-3, dynamic trees of 26 nodes": Eagle3Drafter(network, dynamic=(25, 5, 4)),
        f"Medusa, calibrated tree of {tree.size} nodes": MedusaDrafter(heads, tree),
        f"Medusa, chain of {NUM_TOKENS}": MedusaDrafter(heads, TokenTree.chain(NUM_TOKENS)),
        f"draft model, chain of {NUM_TOKENS}": specdec.ModelDrafter(draft, NUM_TOKENS),
    }


def save(target: specdec.ModelRunner, trained: Path, folder: Path) -> None:
    """Write the drafter as it ships."""
    network, _ = load_eagle3(target, trained, dtype=torch.bfloat16)
    save_drafter(network, folder, num_tokens=NUM_TOKENS, target="specdec/tiny_pair/target")


def options(preset: Mapping) -> dict:
    """Of `scripts.train_eagle3`."""
    return dict(depth=preset["depth"], num_tokens=NUM_TOKENS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, measure; see the module's docstring."""
    given = options_of(__doc__, arguments)
    new = dict(draft_vocabulary=DRAFT_VOCABULARY, intermediate_size=INTERMEDIATE)
    training = TinyTraining(train_eagle3.main, options, new, save, drafters)
    training.run(given, PRESETS[given.preset] | {"depth": DEPTH[given.preset]})


if __name__ == "__main__":
    run_script(main)
