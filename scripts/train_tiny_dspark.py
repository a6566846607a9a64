"""Train the DSpark drafter that ships with the library: self-distilled, measured on held-out prompts.

    python -m scripts.train_tiny_dspark --output runs/tiny_dspark                  # on one core
    python -m scripts.train_tiny_dspark --output runs/tiny_dspark --preset full    # on one GPU
    python -m scripts.train_tiny_dspark --output runs/smoke --preset smoke         # checks the path, not the drafter

Texts, stages and prompts are those of `scripts.train_tiny_eagle3`; the drafter learns by `specdec train --kind dspark`.
Then it is measured beside the shipped EAGLE-3 drafter. The figures go to record.json.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

import specdec
from scripts.common.entry import run_script
from scripts.common.tiny_training import PRESETS, TinyTraining, options_of
from specdec.cli.train_block import DSPARK_COMMAND
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.loading import load_block
from specdec.drafters.block.saving import save_drafter
from specdec.drafters.eagle3.drafter import Eagle3Drafter
from specdec.tiny_eagle3 import load_tiny_eagle3

OWN = {"full": dict(anchors=256), "cpu": dict(anchors=64, whole=400), "smoke": dict(anchors=8)}
# all tokens are drafted, by the target's output layer, so that the weights go into layers and Markov head
# layers of the target's own sizes begin as its last blocks; a run of 600 steps learns more with a first layer that sees
# the last tokens alone, and from kl than from tv
NEW = dict(layers=3, block_size=6, markov_rank=32, target_layers=(2, 10, 17), first_window=4)
NODES = 25


def drafters(target: specdec.ModelRunner, drafter: Path, draft) -> dict[str, specdec.Drafter]:
    """What is measured beside each other, by name."""
    network, _ = load_block(target, drafter)
    slots = network.config.num_slots
    trees = BlockDrafter(network, growth=Growth(NODES, slots))
    return {
        "DSpark, chain of 5": BlockDrafter(network, 5),
        f"DSpark, best-first trees of {NODES + 1} nodes": trees,
        "EAGLE-3, chain of 5": Eagle3Drafter(load_tiny_eagle3(target), 5),
    }


def save(target: specdec.ModelRunner, trained: Path, folder: Path) -> None:
    """Write the drafter as it ships."""
    network, _ = load_block(target, trained, dtype=torch.bfloat16)
    save_drafter(network, folder, target="specdec/tiny_pair/target")


def options(preset: Mapping) -> dict:
    """Of `specdec train --kind dspark`."""
    return dict(anchors=preset["anchors"], loss="kl=1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, measure; see the module's docstring."""
    given = options_of(__doc__, arguments)
    train = partial(DSPARK_COMMAND, prog="python -m scripts.train_tiny_dspark")
    training = TinyTraining(train, options, NEW, save, drafters)
    training.run(given, PRESETS[given.preset] | OWN[given.preset])


if __name__ == "__main__":
    run_script(main)
