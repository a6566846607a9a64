"""`specdec train --kind eagle3` and `--kind peagle`: a drafter for a user's own model, from data files to a folder."""

import argparse
from functools import partial
from typing import Any

import torch

from specdec.cli.command import Command, new_parser
from specdec.cli.training_drafter import (
    ALIKE,
    FILES,
    READERS,
    NetworkTraining,
    about_new,
    add_beginning,
    add_training,
    add_unrolled,
    given_fields,
    unrolled_settings,
)
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.eagle3.saving import LAYOUTS, save_drafter
from specdec.model.runner import ModelRunner
from specdec.training.data import Rows
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.training import train_eagle3
from specdec.training.network import choose_draft_tokens, choose_mask_token
from specdec.training.unrolled.settings import UnrolledSettings

ABOUT = f"""Train {{title}} for a model of your own.

    specdec train --kind {{kind}} --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR
    specdec train --kind {{kind}} --model … --data … --output … --self-distil --temperature 0 0.7
    accelerate launch --num_processes 2 -m specdec train --kind {{kind}} --model … --data … --output … --batch 64

{ALIKE}

{READERS}{{formats}}, {FILES}
"""
TITLES = {
    "eagle3": "an EAGLE-3 drafter",
    "peagle": "a P-EAGLE drafter, which predicts all tokens of a round in one pass,",
}
FORMATS = {"eagle3": " (or with --layout sglang SGLang)", "peagle": ""}


def parser(kind: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The options of a kind and their defaults."""
    text = ABOUT.format(kind=kind, title=TITLES[kind], formats=FORMATS[kind])
    options = new_parser(prog or f"specdec train --kind {kind}", text)
    adding = partial(_add_drafter, kind=kind), partial(_add_learning, kind=kind)
    add_training(options.add_argument, LAYOUTS if kind == "eagle3" else LAYOUTS[:1], *adding, lr=1e-3)
    options.set_defaults(unrolled_kind=kind)
    return options


def _add_drafter(add, kind: str) -> None:
    add_beginning(add)
    size = "tokens that can be drafted: those most frequent in the answers (all, where the model has fewer)"
    add("--draft-vocabulary", type=int, default=32_000, help=size)
    layers = "states that are read, as in output_hidden_states (default: 2, n // 2 and n - 3 of n layers)"
    add("--target-layers", type=int, nargs="+", help=layers)
    if kind == "peagle":
        add("--layers", type=int, default=2, help="of the drafter")
        add("--mask-token", type=int, help="id at parallel slots (default: one that the rows hold least)")
    else:
        add("--norm-output", action="store_true", help="EAGLE-3.1: each step reads the normed output of the one before")
    add("--feature-norm", choices=("none", "each", "whole"), default="none", help="EAGLE-3.1: norm of what is read")


def _add_learning(add, kind: str) -> None:
    parallel = kind == "peagle"
    add_unrolled(add, depth=8 if parallel else 3, decay=0.8, num_tokens=5, after=", and by default afterwards")
    if parallel:
        share = "share of tokens with a k-th further one, from 0 on: max(KEEP^k, KEEP_LEAST)"
        add("--keep", type=float, default=0.7, help=share)
        add("--keep-least", type=float, default=0.2)


def _network(options: argparse.Namespace, model, training: Rows) -> tuple[Eagle3Model, str]:
    """The drafter to begin with, and a line about it. Raises ValueError for one of another kind."""
    parallel = options.unrolled_kind == "peagle"
    if options.start is not None:
        network, _ = load_eagle3(ModelRunner(model, mode="eager"), options.start, dtype=torch.float32)
        if network.config.parallel != parallel:
            other = "peagle" if network.config.parallel else "eagle3"
            raise ValueError(f"--kind {options.unrolled_kind}: the drafter {options.start} is of the kind {other}")
        return network, f"the drafter goes on from {options.start}"
    vocab = model.get_output_embeddings().weight.shape[0]
    tokens, share = choose_draft_tokens(training, min(options.draft_vocabulary, vocab), vocab)
    own: dict[str, Any] = {"feature_norm": options.feature_norm}
    if parallel:
        mask = choose_mask_token(training, model) if options.mask_token is None else options.mask_token
        own |= {"num_layers": options.layers, "mask_token": mask}
    else:
        own["norm_output"] = options.norm_output
    network = new_eagle3(model, tokens, **given_fields(options, **own))
    return network, about_new(network, share) + (f"; mask token {network.config.mask_token}" if parallel else "")


def _settings(options: argparse.Namespace, rows: int) -> UnrolledSettings:
    own = {"keep": options.keep, "keep_least": options.keep_least} if options.unrolled_kind == "peagle" else {}
    return unrolled_settings(options, rows, **own)


def _save(options: argparse.Namespace, network: Eagle3Model, model) -> None:
    save_drafter(network, options.output, options.layout, options.num_tokens, options.model)


_TRAINING = NetworkTraining(_network, _settings, train_eagle3, _save, part="depth")
COMMAND, PEAGLE = (Command(partial(parser, kind), _TRAINING.run) for kind in TITLES)
