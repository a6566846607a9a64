"""`specdec train --kind eagle3`: an EAGLE-3 drafter for a user's own model, from data files to a folder."""

import argparse
import json
import shlex
from dataclasses import replace
from functools import partial

import torch

from specdec.cli.command import Command, new_parser
from specdec.cli.training_options import (
    add_answers,
    add_data,
    add_run,
    add_steps,
    announce,
    steps_of,
)
from specdec.cli.training_rows import load
from specdec.drafters.eagle3.loading import load_eagle3
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.eagle3.saving import LAYOUTS, save_drafter
from specdec.model.runner import ModelRunner
from specdec.report.headless import NOT_DRAWN
from specdec.report.training_plots import draw_training, plot_acceptance, plot_losses, plot_speed
from specdec.training.acceptance import LENGTH, prompts_in
from specdec.training.checkpoint import write_json
from specdec.training.data import Rows
from specdec.training.eagle3.network import new_eagle3
from specdec.training.eagle3.settings import LOSSES, Eagle3Settings
from specdec.training.eagle3.training import train_eagle3
from specdec.training.network import choose_draft_tokens

ABOUT = """Train an EAGLE-3 drafter for a model of your own.

    specdec train --kind eagle3 --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR
    specdec train --kind eagle3 --model … --data … --output … --self-distil --temperature 0 0.7
    accelerate launch --num_processes 2 -m specdec train --kind eagle3 --model … --data … --output … --batch 64

Rows of the data, those that are left out, --self-distil and what a killed run does are as with --kind medusa. The
model's hidden states are computed as they are needed and never stored. Held-out prompts are decoded with the drafter
every --validate-every steps: the drafter with the best acceptance length remains, and --patience ends a run that no
longer gets better. DIR gets config.json and model.safetensors, which specdec.load_drafter, vLLM and the speculators
library read (or with --layout sglang SGLang), log.json, training.png where matplotlib is installed and, where
TensorBoard is, its logs.
"""


def parser(prog: str = "specdec train --kind eagle3") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, ABOUT)
    add = options.add_argument
    add_data(add)
    add("--validation-prompts", type=int, default=32, help="held-out prompts that are decoded")
    add("--validation-tokens", type=int, default=128, help="that are decoded after each of them")
    _add_drafter(add)
    add_steps(add)
    _add_learning(add)
    add_answers(add)
    add_run(add, "drafter's")
    add("--layout", choices=LAYOUTS, default="speculators", help="format of the drafter's files")
    return options


def _add_drafter(add) -> None:
    start = "folder or hub id of a drafter to go on from; it keeps its sizes and its draft vocabulary"
    add("--start", metavar="DRAFTER", help=start)
    size = "tokens that can be drafted: those most frequent in the answers (all, where the model has fewer)"
    add("--draft-vocabulary", type=int, default=32_000, help=size)
    layers = "states that are read, as in output_hidden_states (default: 2, n // 2 and n - 3 of n layers)"
    add("--target-layers", type=int, nargs="+", help=layers)
    add("--intermediate-size", type=int, help="of the drafter's layer (default: the model's)")
    add("--norm-output", action="store_true", help="EAGLE-3.1: each step reads the normed output of the one before")
    add("--feature-norm", choices=("none", "each", "whole"), default="none", help="EAGLE-3.1: norm of what is read")


def _add_learning(add) -> None:
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=float, default=0.04, help="share of the steps")
    add("--depth", type=int, default=3, help="tokens drafted after each token (steps of the training-time test)")
    add("--decay", type=float, default=0.8, help="of the weight of each further one")
    loss = "kl or tv: from the model's distribution, ce: of the text's tokens"
    add("--loss", choices=LOSSES, default="kl", help=loss)
    add("--patience", type=int, help="validations without a better acceptance length that end the run (default: none)")
    add("--num-tokens", type=int, default=5, help="drafted in each round of a validation, and by default afterwards")


def run(options: argparse.Namespace) -> None:
    """Load the model, prepare the rows, train the drafter and save it."""
    given = load(options, options.validation_prompts)
    accelerator, model, training = given.accelerator, given.model, given.training
    prompts = prompts_in(given.validation, options.validation_prompts, options.prompt_tokens)
    network, said = _network(options, model, training)
    accelerator.print(
        f"{len(training)} rows of {training.tokens.shape[1]} tokens, {given.learned:,} of them learned; "
        f"{len(prompts)} prompts to validate on\n{said}"
    )
    settings = _settings(options, len(training))
    announce(options, accelerator, model, settings.steps, "the drafter")
    records = train_eagle3(model, network, training, options.output, settings, prompts, accelerator)
    accelerator.end_training()
    if accelerator.is_main_process:
        save(options, network.to(model.dtype), records)


def _network(options: argparse.Namespace, model, training: Rows) -> tuple[Eagle3Model, str]:
    """The drafter to begin with, and a line about it."""
    if options.start is not None:
        network, _ = load_eagle3(ModelRunner(model, mode="eager"), options.start, dtype=torch.float32)
        return network, f"the drafter goes on from {options.start}"
    vocab = model.get_output_embeddings().weight.shape[0]
    tokens, share = choose_draft_tokens(training, min(options.draft_vocabulary, vocab), vocab)
    fields = {"norm_output": options.norm_output, "feature_norm": options.feature_norm}
    if options.target_layers is not None:
        fields["target_layers"] = tuple(options.target_layers)
    if options.intermediate_size is not None:
        fields["intermediate_size"] = options.intermediate_size
    network = new_eagle3(model, tokens, **fields)
    size, config = sum(parameter.numel() for parameter in network.parameters()), network.config
    return network, (
        f"the drafter has {size:,} parameters, reads the states {config.target_layers} and drafts "
        f"{config.draft_vocab_size:,} of {vocab:,} tokens, {share:.1%} of those learned"
    )


def _settings(options: argparse.Namespace, rows: int) -> Eagle3Settings:
    """The options that are settings of the training, with the steps that so many epochs of `rows` take."""
    same = ("batch", "rows_at_once", "lr", "warmup", "depth", "decay", "loss", "patience", "num_tokens", "seed",
            "save_every", "log_every", "validate_every")  # fmt: skip
    settings = Eagle3Settings(steps_of(options, rows), **{name: getattr(options, name) for name in same})
    return replace(settings, max_new_tokens=options.validation_tokens)


def save(options: argparse.Namespace, network: Eagle3Model, records: list[dict]) -> None:
    """Write drafter, log and picture. Tells where they are and which command comes next."""
    save_drafter(network, options.output, options.layout, options.num_tokens, options.model)
    write_json(records, options.output / "log.json")
    plots = partial(plot_losses, part="depth"), plot_acceptance, plot_speed
    picture = draw_training(options.output, records, plots)
    best = max((record[LENGTH] for record in records if LENGTH in record), default=None)
    speed = round(records[-1]["tokens_per_second"], 1)
    print(json.dumps({"loss": records[-1]["loss"], "tokens_per_second": speed, LENGTH: best}))
    print(f"picture: {picture}" if picture else NOT_DRAWN)
    print(f"drafter: {options.output}")
    print(f"next: {shlex.join(['specdec', 'bench', '--target', options.model, '--drafter', str(options.output)])}")


COMMAND = Command(parser, run)
