"""`specdec train --kind mtp`: a user's own model's MTP modules, from data files to a folder."""

import argparse

import torch

from specdec.cli.command import Command, new_parser
from specdec.cli.training_drafter import ALIKE, FILES, NetworkTraining, add_training, add_unrolled, unrolled_settings
from specdec.drafters.mtp.drafter import load_modules
from specdec.drafters.mtp.layouts import LAYOUTS
from specdec.drafters.mtp.saving import save_mtp
from specdec.training.data import Rows
from specdec.training.mtp.network import MtpNetwork, new_mtp
from specdec.training.mtp.training import train_mtp

ABOUT = f"""Train the MTP modules of a model of your own: those of its checkpoint, or with --fresh a new one.

    specdec train --kind mtp --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR
    specdec train --kind mtp --model … --data … --output … --number 0 --depth 3 --self-distil --temperature 0 0.7
    specdec train --kind mtp --model … --data … --output … --fresh qwen3-next --lr 1e-3

One module takes every step; where the checkpoint has several, each takes one, unless --number picks a single one.
{ALIKE}

DIR gets config.json and model.safetensors, which specdec.load_drafter with kind="mtp" reads; the weights have the names
of the layout, so that other engines find them once the file is added to the model's checkpoint. Also {FILES}
"""
NEXT = "mtp:path={}"


def parser(prog: str = "specdec train --kind mtp") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, ABOUT)
    add_training(options.add_argument, None, _add_modules, _add_learning, lr=1e-4)
    return options


def _add_modules(add) -> None:
    start = "folder or hub id of a checkpoint with MTP modules to go on from (default: the model's own)"
    add("--start", metavar="CHECKPOINT", help=start)
    names = [layout.short_name for layout in LAYOUTS]
    add("--fresh", choices=names, help="begin with a new module in this layout instead")
    add("--number", type=int, help="of the only module that learns (default: all, one a depth)")


def _add_learning(add) -> None:
    add_unrolled(add, depth=3, decay=0.6, num_tokens=3)


def _network(options: argparse.Namespace, model, training: Rows) -> tuple[MtpNetwork, str]:
    """The modules to begin with, and a line about them. Raises ValueError for --fresh beside --start or --number."""
    if options.fresh is not None:
        for name in ("start", "number"):
            if getattr(options, name) is not None:
                raise ValueError(f"--fresh {options.fresh} begins anew, got --{name} {getattr(options, name)} too")
        network, whence = new_mtp(model, options.fresh), "new"
    else:
        network = MtpNetwork(load_modules(model, options.start, options.number)).to(torch.float32)
        whence = f"from {options.start or options.model}"
    size, count = sum(parameter.numel() for parameter in network.parameters()), len(network.parts)
    how = "repeated at every depth" if count == 1 else "one a depth"
    layout = network.parts[0].layout.name
    return network, f"{count} MTP module{'s' * (count > 1)}, {how}, {whence}: {size:,} parameters, {layout} layout"


def _save(options: argparse.Namespace, network: MtpNetwork, model) -> None:
    save_mtp(network.parts, options.output)


COMMAND = Command(parser, NetworkTraining(_network, unrolled_settings, train_mtp, _save, part="depth", named=NEXT).run)
