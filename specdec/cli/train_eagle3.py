"""`specdec train --kind eagle3`: an EAGLE-3 drafter for a user's own model, from data files to a folder."""

import argparse

import torch

from specdec.cli.command import Command, new_parser
from specdec.cli.training_drafter import ALIKE, FILES, NetworkTraining, about_new, add_training, given_fields
from specdec.cli.training_options import same_options, steps_of
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.eagle3.saving import LAYOUTS, save_drafter
from specdec.model.runner import ModelRunner
from specdec.training.data import Rows
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.training import train_eagle3
from specdec.training.network import choose_draft_tokens
from specdec.training.unrolled.settings import LOSSES, UnrolledSettings

ABOUT = f"""Train an EAGLE-3 drafter for a model of your own.

    specdec train --kind eagle3 --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR
    specdec train --kind eagle3 --model … --data … --output … --self-distil --temperature 0 0.7
    accelerate launch --num_processes 2 -m specdec train --kind eagle3 --model … --data … --output … --batch 64

{ALIKE} (or with --layout sglang SGLang), {FILES}
"""


def parser(prog: str = "specdec train --kind eagle3") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, ABOUT)
    add_training(options.add_argument, LAYOUTS, _add_drafter, _add_learning, lr=1e-3)
    return options


def _add_drafter(add) -> None:
    size = "tokens that can be drafted: those most frequent in the answers (all, where the model has fewer)"
    add("--draft-vocabulary", type=int, default=32_000, help=size)
    layers = "states that are read, as in output_hidden_states (default: 2, n // 2 and n - 3 of n layers)"
    add("--target-layers", type=int, nargs="+", help=layers)
    add("--norm-output", action="store_true", help="EAGLE-3.1: each step reads the normed output of the one before")
    add("--feature-norm", choices=("none", "each", "whole"), default="none", help="EAGLE-3.1: norm of what is read")


def _add_learning(add) -> None:
    add("--depth", type=int, default=3, help="tokens drafted after each token (steps of the training-time test)")
    add("--decay", type=float, default=0.8, help="of the weight of each further one")
    loss = "kl or tv: from the model's distribution, ce: of the text's tokens"
    add("--loss", choices=LOSSES, default="kl", help=loss)
    add("--num-tokens", type=int, default=5, help="drafted in each round of a validation, and by default afterwards")


def _network(options: argparse.Namespace, model, training: Rows) -> tuple[Eagle3Model, str]:
    """The drafter to begin with, and a line about it."""
    if options.start is not None:
        network, _ = load_eagle3(ModelRunner(model, mode="eager"), options.start, dtype=torch.float32)
        return network, f"the drafter goes on from {options.start}"
    vocab = model.get_output_embeddings().weight.shape[0]
    tokens, share = choose_draft_tokens(training, min(options.draft_vocabulary, vocab), vocab)
    fields = given_fields(options, norm_output=options.norm_output, feature_norm=options.feature_norm)
    network = new_eagle3(model, tokens, **fields)
    return network, about_new(network, share)


def _settings(options: argparse.Namespace, rows: int) -> UnrolledSettings:
    """The options that are settings of the training, with the steps that so many epochs of `rows` take."""
    own = {name: getattr(options, name) for name in ("depth", "decay", "loss", "num_tokens")}
    return UnrolledSettings(steps_of(options, rows), **same_options(options), **own)


def _save(options: argparse.Namespace, network: Eagle3Model, model) -> None:
    save_drafter(network, options.output, options.layout, options.num_tokens, options.model)


COMMAND = Command(parser, NetworkTraining(_network, _settings, train_eagle3, _save, part="depth").run)
