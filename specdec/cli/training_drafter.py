"""What `specdec train` of the kinds with a network of their own shares: from options to a trained drafter's folder."""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from specdec.cli.training_options import (
    Add,
    add_answers,
    add_data,
    add_run,
    add_steps,
    announce,
    same_options,
    steps_of,
)
from specdec.cli.training_rows import load
from specdec.report.headless import NOT_DRAWN
from specdec.report.training_plots import draw_training, plot_acceptance, plot_losses, plot_speed
from specdec.training.acceptance import LENGTH, prompts_in
from specdec.training.checkpoint import write_json
from specdec.training.data import Rows
from specdec.training.unrolled.settings import LOSSES, UnrolledSettings

ALIKE = """\
Rows of the data, those that are left out, --self-distil and what a killed run does are as with --kind medusa. The
model's hidden states are computed as they are needed and never stored. Held-out prompts are decoded with the drafter
every --validate-every steps: the drafter with the best acceptance length remains, and --patience ends a run that no
longer gets better."""
READERS = (
    "DIR gets config.json and model.safetensors, which specdec.load_drafter, vLLM and the speculators library read"
)
FILES = "log.json, training.png where matplotlib is installed and, where TensorBoard is, its logs."


@dataclass(frozen=True, slots=True)
class NetworkTraining:
    """A kind of network as its command trains it.

    make: `make(options, model, rows)` -> the network to begin with, and a line about it.
    settings: `settings(options, count of rows)`.
    train: `train(model, network, rows, output, settings, prompts, accelerator)` -> records.
    save: `save(options, network, model)` writes the drafter's files.
    part: what the parts of the loss are called in the records.
    named: the drafter in DIR as an option of other commands names it.
    """

    make: Callable[[argparse.Namespace, Any, Rows], tuple[Any, str]]
    settings: Callable[[argparse.Namespace, int], Any]
    train: Callable[..., list[dict]]
    save: Callable[[argparse.Namespace, Any, Any], None]
    part: str
    named: str = "{}"

    def run(self, options: argparse.Namespace) -> None:
        """Load the model, prepare the rows, train the drafter and save it."""
        given = load(options, options.validation_prompts)
        accelerator, model, training = given.accelerator, given.model, given.training
        prompts = prompts_in(given.validation, options.validation_prompts, options.prompt_tokens)
        network, said = self.make(options, model, training)
        accelerator.print(
            f"{len(training)} rows of {training.tokens.shape[1]} tokens, {given.learned:,} of them learned; "
            f"{len(prompts)} prompts to validate on\n{said}"
        )
        settings = self.settings(options, len(training))
        announce(options, accelerator, model, settings.steps, "the drafter")
        records = self.train(model, network, training, options.output, settings, prompts, accelerator)
        accelerator.end_training()
        if accelerator.is_main_process:
            self.save(options, network.to(model.dtype), model)
            _finish(options, records, self.part, self.named.format(options.output))


def add_training(add: Add, layouts: Sequence[str] | None, drafter: Callable[[Add], None],
                 learning: Callable[[Add], None], lr: float) -> None:  # fmt: skip
    """All options of such a command; `drafter` and `learning` add those of the kind's network and of its losses.

    layouts: formats of the drafter's files, the first one by default (None: there is no choice)."""
    add_data(add)
    add("--validation-prompts", type=int, default=32, help="held-out prompts that are decoded")
    add("--validation-tokens", type=int, default=128, help="that are decoded after each of them")
    drafter(add)
    add_steps(add)
    add("--lr", type=float, default=lr)
    add("--warmup", type=float, default=0.04, help="share of the steps")
    learning(add)
    add("--patience", type=int, help="validations without a better acceptance length that end the run (default: none)")
    add_answers(add)
    add_run(add, "drafter's")
    if layouts is not None:
        add("--layout", choices=layouts, default=layouts[0], help="format of the drafter's files")


def add_beginning(add: Add) -> None:
    """--start and --intermediate-size, of kinds whose networks have sizes of their own."""
    start = "folder or hub id of a drafter to go on from; it keeps its sizes and its draft vocabulary"
    add("--start", metavar="DRAFTER", help=start)
    add("--intermediate-size", type=int, help="of the drafter's layers (default: the model's)")


def add_unrolled(add: Add, depth: int, decay: float, num_tokens: int, after: str = "") -> None:
    """--depth, --decay, --loss and --num-tokens, of kinds that are trained by steps after every token.

    after: what else --num-tokens is good for."""
    add("--depth", type=int, default=depth, help="tokens drafted after each token (steps of the training-time test)")
    add("--decay", type=float, default=decay, help="of the weight of each further one")
    loss = "kl or tv: from the model's distribution, ce: of the text's tokens"
    add("--loss", choices=LOSSES, default="kl", help=loss)
    add("--num-tokens", type=int, default=num_tokens, help=f"drafted in each round of a validation{after}")


def unrolled_settings(options: argparse.Namespace, rows: int, **more: float) -> UnrolledSettings:
    """The options of such a kind that are settings, and `more`, with the steps that so many epochs of `rows` take."""
    own: dict[str, Any] = {name: getattr(options, name) for name in ("depth", "decay", "loss", "num_tokens")} | more
    return UnrolledSettings(steps_of(options, rows), **same_options(options), **own)


def given_fields(options: argparse.Namespace, **fields: Any) -> dict[str, Any]:
    """`fields` of a network's config that are not None, with those of --target-layers and --intermediate-size."""
    layers = None if options.target_layers is None else tuple(options.target_layers)
    fields |= {"target_layers": layers, "intermediate_size": options.intermediate_size}
    return {name: value for name, value in fields.items() if value is not None}


def about_new(network, share: float) -> str:
    """A line about a new network, which drafts `share` of the tokens that are learned."""
    size, config = sum(parameter.numel() for parameter in network.parameters()), network.config
    return (
        f"the drafter has {size:,} parameters, reads the states {config.target_layers} and drafts "
        f"{config.draft_vocab_size:,} of {config.target_vocab_size:,} tokens, {share:.1%} of those learned"
    )


def _finish(options: argparse.Namespace, records: list[dict], part: str, drafter: str) -> None:
    """Write log and picture. Tells where they are and which command comes next."""
    write_json(records, options.output / "log.json")
    picture = draw_training(options.output, records, (partial(plot_losses, part=part), plot_acceptance, plot_speed))
    best = max((record[LENGTH] for record in records if LENGTH in record), default=None)
    speed = round(records[-1]["tokens_per_second"], 1)
    print(json.dumps({"loss": records[-1]["loss"], "tokens_per_second": speed, LENGTH: best}))
    print(f"picture: {picture}" if picture else NOT_DRAWN)
    print(f"drafter: {options.output}")
    print(f"next: {shlex.join(['specdec', 'bench', '--target', options.model, '--drafter', drafter])}")
