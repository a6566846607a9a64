"""`specdec train --kind dflash` and `--kind dspark`: a block drafter for a user's own model, from data to a folder."""

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
    given_fields,
)
from specdec.cli.training_options import same_options, steps_of
from specdec.drafters.block.loading import load_block
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.saving import LAYOUTS, require_layout, save_drafter
from specdec.model.runner import ModelRunner
from specdec.training.block.network import DSPARK, new_block
from specdec.training.block.settings import LOSSES, BlockSettings
from specdec.training.block.training import train_block
from specdec.training.data import Rows
from specdec.training.network import choose_draft_tokens, choose_mask_token

ABOUT = f"""Train a {{title}} drafter, which predicts a block of tokens in one pass, for a model of your own.

    specdec train --kind {{kind}} --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR
    specdec train --kind {{kind}} --model … --data … --output … --self-distil --temperature 0 0.7
    accelerate launch --num_processes 2 -m specdec train --kind {{kind}} --model … --data … --output … --batch 64

{ALIKE}

{READERS} (or with --layout z-lab the field's own code), {FILES}
"""
TITLES = {"dflash": "DFlash", "dspark": "DSpark"}
LOSS = {"dflash": ["ce=1"], "dspark": ["ce=0.1", "tv=0.9"]}


def parser(kind: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The options of a kind and their defaults."""
    options = new_parser(prog or f"specdec train --kind {kind}", ABOUT.format(kind=kind, title=TITLES[kind]))
    learning = partial(_add_learning, kind=kind)
    add_training(options.add_argument, LAYOUTS, partial(_add_drafter, kind=kind), learning, lr=6e-4)
    options.set_defaults(block_kind=kind)
    return options


def _add_drafter(add, kind: str) -> None:
    dspark = kind == "dspark"
    add_beginning(add)
    add("--layers", type=int, default=5, help="of the drafter")
    add("--block-size", type=int, default=7 if dspark else 16, help="tokens of a block, the last accepted one included")
    slots = "whether a mask token's place predicts the token at it, or each place, from the anchor's on, the next token"
    add("--slots", choices=("fill-in", "from-anchor"), default="from-anchor" if dspark else "fill-in", help=slots)
    size = "tokens that can be drafted: those most frequent in the answers, by an output layer of the drafter's own "
    add("--draft-vocabulary", type=int, help=size + "(default: all, by the model's output layer)")
    layers = "states that are read, as in output_hidden_states (default: as many as --layers, evenly from 2 to n - 2)"
    add("--target-layers", type=int, nargs="+", help=layers)
    window = (
        "the last tokens before a block that the first layer sees; a few make short trainings learn more (default: all)"
    )
    add("--first-window", type=int, help=window)
    add("--mask-token", type=int, help="id at places that are not known yet (default: one that the rows hold least)")
    if dspark:
        add("--markov", choices=("vanilla", "gated", "rnn"), default=DSPARK["markov"], help="kind of the Markov head")
        add("--markov-rank", type=int, default=DSPARK["markov_rank"])
        add("--no-confidence", action="store_true", help="without the head that estimates acceptance")


def _add_learning(add, kind: str) -> None:
    add("--anchors", type=int, default=512, help="random blocks of a row in a step, at most")
    add("--gamma", type=float, default=4.0, help="slot k, from 0 on, has the weight exp(-k / gamma)")
    what = "kl and tv: from the model's distribution, ce: of the text's tokens"
    shown = f"losses and their weights; {what} (default {' '.join(LOSS[kind])})"
    add("--loss", nargs="+", default=LOSS[kind], metavar="NAME=WEIGHT", help=shown)
    add(
        "--num-tokens", type=int, help="drafted in each round of a validation, and by default afterwards (default: all)"
    )


def _network(options: argparse.Namespace, model, training: Rows) -> tuple[BlockModel, str]:
    """The drafter to begin with, and a line about it. Raises ValueError where --layout cannot hold it."""
    if options.start is not None:
        network, _ = load_block(ModelRunner(model, mode="eager"), options.start, dtype=torch.float32)
        said = f"the drafter goes on from {options.start}"
    else:
        network, share = _new_network(options, model, training)
        said = f"{about_new(network, share)}; mask token {network.config.mask_token}"
    require_layout(network, options.layout, model.config.get_text_config().num_hidden_layers)
    return network, said


def _new_network(options: argparse.Namespace, model, training: Rows) -> tuple[BlockModel, float]:
    """An untrained drafter, and the share of what is learned that it can draft."""
    vocab = model.get_output_embeddings().weight.shape[0]
    size = vocab if options.draft_vocabulary is None else min(options.draft_vocabulary, vocab)
    tokens, share = choose_draft_tokens(training, size, vocab)
    mask = choose_mask_token(training, model) if options.mask_token is None else options.mask_token
    fields = given_fields(options, from_anchor=options.slots == "from-anchor", windows=windows_of(options))
    if options.block_kind == "dspark":
        fields |= dict(markov=options.markov, markov_rank=options.markov_rank,
                       confidence="none" if options.no_confidence else DSPARK["confidence"])  # fmt: skip
    return new_block(model, mask, tokens, options.block_size, options.layers, **fields), share


def windows_of(options: argparse.Namespace) -> tuple[int | None, ...] | None:
    """What each layer sees of the text; None: all of it in all layers."""
    return None if options.first_window is None else (options.first_window, *[None] * (options.layers - 1))


def loss_of(given: list[str]) -> tuple[tuple[str, float], ...]:
    """What `--loss NAME=WEIGHT …` stands for. Raises ValueError naming what is neither.

    >>> loss_of(["ce=0.1", "tv=0.9"])
    (('ce', 0.1), ('tv', 0.9))
    """
    found = []
    for part in given:
        name, _, weight = part.partition("=")
        try:
            found.append((name, float(weight)))
        except ValueError:
            raise ValueError(f"--loss is NAME=WEIGHT …, of {', '.join(LOSSES)}, got {part!r}") from None
    return tuple(found)


def _settings(options: argparse.Namespace, rows: int) -> BlockSettings:
    """The options that are settings of the training, with the steps that so many epochs of `rows` take."""
    own: dict[str, Any] = {name: getattr(options, name) for name in ("anchors", "gamma", "num_tokens")}
    return BlockSettings(steps_of(options, rows), **same_options(options), **own, loss=loss_of(options.loss))


def _save(options: argparse.Namespace, network: BlockModel, model) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    save_drafter(network, options.output, options.layout, options.num_tokens, options.model, layers)


_TRAINING = NetworkTraining(_network, _settings, train_block, _save, part="slot")
DFLASH, DSPARK_COMMAND = (Command(partial(parser, kind), _TRAINING.run) for kind in ("dflash", "dspark"))
