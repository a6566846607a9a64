"""`python -m scripts.train_medusa`: heads for a user's own model, from data files to a folder or the hub."""

import argparse
import json
import shlex

from medusa.adapter import add_lora
from medusa.base_model import with_base
from medusa.calibration import head_ranks
from medusa.card import model_card
from medusa.heads import MedusaHeads
from medusa.plots import plot_loss, plot_training
from medusa.settings import TrainingSettings
from medusa.training import train_medusa
from specdec.cli.command import Command, dtype_of, new_parser
from specdec.cli.training_options import (
    add_answers,
    add_data,
    add_run,
    add_steps,
    announce,
    steps_of,
)
from specdec.cli.training_rows import load
from specdec.loading import load_model
from specdec.report.headless import NOT_DRAWN
from specdec.report.training_plots import draw_training, plot_speed
from specdec.training.checkpoint import write_json
from specdec.training.data import Rows
from specdec.training.hub import push_model
from specdec.training.sharding import is_fsdp

ABOUT = """Train Medusa heads for a model of your own.

    specdec train --kind medusa --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR
    specdec train --kind medusa --model … --data … --output … --self-distil --temperature 0 0.7
    accelerate launch --num_processes 2 -m scripts.train_medusa --model … --data … --output … --batch 64
    torchrun --standalone --nproc_per_node 2 -m scripts.train_medusa --model … --data … --output …  # on CPUs

Rows of the data are {"messages": […]}, {"text": …} or ShareGPT's {"conversations": […]}; chats are learned where the
assistant speaks, with their tools and switches of the template. Rows that cannot be learned from are left out and
counted by reason; --strict stops at the first. With --self-distil the model first writes the answers itself, which is
what heads learn best from. --joint-steps makes it Medusa-2: after the heads alone the model learns too, through LoRA,
and is written to DIR/model. A killed run goes on from its last checkpoint with the same command. DIR gets the heads, a
model card, accuracies.json, log.json, training.png where matplotlib is installed and, where TensorBoard is, its logs.
With --push-to-hub REPO the heads go to the hub when all that is done, and Medusa-2's model with its tokenizer to
REPO-model; the same command repeats a failed upload.
"""


def parser(prog: str = "specdec train --kind medusa") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, ABOUT)
    add = options.add_argument
    add_data(add)
    add("--validation-rows", type=int, default=64, help="rows of tokens that accuracies are measured on, at most")
    _add_heads(add)
    add_steps(add)
    _add_rates(add)
    add_answers(add)
    add_run(add, "heads'")
    push = "upload the heads when they are done, and Medusa-2's model to REPO-model"
    add("--push-to-hub", metavar="REPO", help=push)
    return options


def _add_heads(add) -> None:
    start = "folder or hub id of heads to go on from; they keep their number, layers and output"
    add("--start", metavar="HEADS", help=start)
    add("--heads", type=int, default=5)
    add("--layers", type=int, default=1, help="residual blocks a head")
    add("--output-layer", choices=("own", "shared", "low_rank"), default="own")
    add("--rank", type=int, help="of low_rank")


def _add_rates(add) -> None:
    add("--lr", type=float, help="of the heads (default 1e-3, with --joint-steps 2e-3)")
    add("--warmup", type=float, default=0.1, help="share of the steps")
    add("--label-share", type=float, default=1.0, help="share of the labels learned in each step")
    add("--shard", action="store_true", help="keep a share of the model's layers on each process (FSDP)")
    joint = "Medusa-2: so many of the steps, at the end, train the model too"
    add("--joint-steps", type=int, default=0, help=joint)
    add("--backbone-lr", type=float, default=5e-4)
    add("--gradient-checkpointing", action="store_true", help="of the model, for joint steps")


def run(options: argparse.Namespace) -> None:
    """Load the model, prepare the rows, train the heads, save and upload them."""
    loaded = load(options, options.validation_rows)
    accelerator, model, tokenizer = loaded.accelerator, loaded.model, loaded.tokenizer
    training, validation, learned = loaded.training, loaded.validation, loaded.learned
    accelerator.print(
        f"{len(training)} rows of {training.tokens.shape[1]} tokens, {learned:,} of them learned; "
        f"{len(validation)} rows to validate on"
    )

    if options.start is None:
        heads = MedusaHeads.for_model(model, options.heads, options.layers, options.output_layer, options.rank)
    else:
        heads = continued(options.start, model)
    adapter = add_lora(model) if options.joint_steps else None
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = _settings(options, len(training))
    plain = announce(options, accelerator, model, settings.steps, "the heads")
    dtype_of_heads = next(heads.parameters()).dtype
    shard = options.shard or is_fsdp(accelerator)
    given = model, heads.float(), training, options.output, settings, validation, accelerator, adapter
    records = train_medusa(*given, shard=shard)
    accelerator.end_training()
    if accelerator.is_main_process:
        if shard:  # this process has a part of it
            model = load_model(options.model, dtype_of(options), accelerator.device)
        told: dict = {"steps": settings.steps, "rows": len(training), "tokens learned": learned}
        told |= {"processes": accelerator.num_processes, "tokens a second": round(records[-1]["tokens_per_second"])}
        told |= plain
        save(options, model, tokenizer, heads.to(dtype_of_heads), adapter, validation, records, told)


def _settings(options: argparse.Namespace, rows: int) -> TrainingSettings:
    """The options that are settings of the training, with the steps that so many epochs of `rows` take."""
    same = ("batch", "rows_at_once", "lr", "warmup", "label_share", "joint_steps", "backbone_lr", "seed", "save_every",
            "log_every", "validate_every")  # fmt: skip
    return TrainingSettings(
        steps_of(options, rows), self_distilled=options.self_distil, **{name: getattr(options, name) for name in same}
    )


def continued(name: str, model) -> MedusaHeads:
    """The heads in a folder or on the hub, for `model`; raises ValueError where they do not fit it."""
    like = MedusaHeads.for_model(model, 1, output="shared")  # the smallest that are made for it
    heads = MedusaHeads.from_pretrained(name)
    sizes = [(c.vocab_size, c.hidden_size) for c in (heads.config, like.config)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the heads in {name} are for a model of [V, H] {sizes[0]}, this one has {sizes[1]}")
    heads.config = with_base(heads.config, model)
    return heads.to(next(like.parameters()))


def save(options: argparse.Namespace, model, tokenizer, heads: MedusaHeads, adapter, validation: Rows,
         records: list[dict], training: dict) -> None:  # fmt: skip
    """Write heads, card, picture, accuracies and log, and Medusa-2's merged model; upload last, so that a failure loses
    nothing. Tells where they are and which command comes next."""
    name = options.model
    if adapter is not None:
        model, name = adapter.merge_and_unload(), str(options.output / "model")
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        # these heads fit the merged model only
        heads.config = with_base(heads.config, model, name)
    accuracies = head_ranks(heads, model, validation).accuracies()
    write_json({"accuracies": accuracies, "rows": len(validation)}, options.output / "accuracies.json")
    write_json(records, options.output / "log.json")
    picture = draw_training(options.output, records, (plot_loss, plot_training, plot_speed))
    card = lambda: model_card(heads, accuracies, training, picture.name if picture else None)
    heads.save_pretrained(options.output, card())
    if options.push_to_hub:
        if adapter is not None:
            base = push_model(model, tokenizer, f"{options.push_to_hub}-model")
            heads.config = with_base(heads.config, model, base)
        print(heads.push_to_hub(options.push_to_hub, card(), [picture] if picture else []))
    last = records[-1]
    tops = {name: round(value, 4) for name, value in last.items() if "_top_" in name}
    print(json.dumps({"loss": last["loss"], "tokens_per_second": round(last["tokens_per_second"], 1)} | tops))
    print(f"picture: {picture}" if picture else NOT_DRAWN)
    print(f"heads: {options.output}")
    print(f"next, their tree (best on text that they have not seen): {_calibration(options, name)}")


def _calibration(options: argparse.Namespace, model: str) -> str:
    """The command that makes a tree for the heads that were trained."""
    data = options.validation or "HELD_OUT.jsonl"
    given = ["--model", model, *(["--tokenizer", options.tokenizer] if options.tokenizer else [])]
    given += ["--heads", str(options.output), "--data", str(data), *(["--self-distil"] if options.self_distil else [])]
    return shlex.join(["specdec", "calibrate", "--kind", "medusa", *given])


COMMAND = Command(parser, run)
