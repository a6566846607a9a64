"""`python -m scripts.train_medusa`: heads for a user's own model, from data files to a folder or the hub."""

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from attention import ModelAdapter, UnsupportedArchitecture
from medusa.adapter import add_lora
from medusa.base_model import with_base
from medusa.calibration import head_ranks
from medusa.card import model_card
from medusa.cli.rows import prepare
from medusa.heads import MedusaHeads
from medusa.plots import plot_loss, plot_speed, plot_training
from medusa.settings import TrainingSettings
from medusa.training import train_medusa
from specdec.cli.command import Command, add_dtype_option, dtype_of, new_parser
from specdec.loading import load_model
from specdec.model.fusion.quantised.activations import quantises_activations
from specdec.report.headless import NOT_DRAWN, headless_pyplot
from specdec.training.checkpoint import write_json
from specdec.training.data import Rows
from specdec.training.hub import push_model
from specdec.training.report import RowReport

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
    for add in (_add_data, _add_heads, _add_steps, _add_answers, _add_run):
        add(options.add_argument)
    return options


def _add_data(add) -> None:
    add("--model", required=True, help="folder or hub id")
    add("--tokenizer", help="folder or hub id (default: the model's)")
    add("--data", type=Path, required=True, help="jsonl, or ShareGPT's json")
    strict = "stop at the first row that cannot be learned from; they are left out and counted otherwise"
    add("--strict", action="store_true", help=strict)
    add("--validation", type=Path, help="jsonl of the same kinds (default: --validation-share of the data)")
    add("--validation-share", type=float, default=0.02)
    add("--validation-rows", type=int, default=64, help="rows of tokens that accuracies are measured on, at most")
    add("--output", type=Path, required=True)


def _add_heads(add) -> None:
    start = "folder or hub id of heads to go on from; they keep their number, layers and output"
    add("--start", metavar="HEADS", help=start)
    add("--heads", type=int, default=5)
    add("--layers", type=int, default=1, help="residual blocks a head")
    add("--output-layer", choices=("own", "shared", "low_rank"), default="own")
    add("--rank", type=int, help="of low_rank")


def _add_steps(add) -> None:
    add("--length", type=int, default=2048, help="tokens a row")
    add("--no-packing", action="store_true", help="one text a row")
    add("--epochs", type=float, default=2.0)
    add("--steps", type=int, help="instead of epochs")
    add("--batch", type=int, default=16, help="rows a step, over all processes")
    at_once = "rows a forward of a process: the rest of its rows is accumulated"
    add("--rows-at-once", type=int, default=4, help=at_once)
    add("--lr", type=float, help="of the heads (default 1e-3, with --joint-steps 2e-3)")
    add("--warmup", type=float, default=0.1, help="share of the steps")
    add("--label-share", type=float, default=1.0, help="share of the labels learned in each step")
    joint = "Medusa-2: so many of the steps, at the end, train the model too"
    add("--joint-steps", type=int, default=0, help=joint)
    add("--backbone-lr", type=float, default=5e-4)
    add("--gradient-checkpointing", action="store_true", help="of the model, for joint steps")


def _add_answers(add) -> None:
    add("--self-distil", action="store_true", help="let the model write the answers first")
    add("--max-new-tokens", type=int, default=512, help="of an answer")
    add("--prompt-tokens", type=int, default=64, help="of a text, that are its prompt")
    add("--temperature", type=float, nargs="+", default=[0.7], help="of the answers, batch by batch in turn")
    add("--answer-batch", type=int, default=32)


def _add_run(add) -> None:
    add_dtype_option(add)
    add(
        "--precision",
        choices=("no", "bf16"),
        help="of the heads' arithmetic (default: bf16 on a GPU, else the model's)",
    )
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--validate-every", type=int, default=200)
    add("--log-every", type=int, default=10)
    add("--seed", type=int, default=0)
    push = "upload the heads when they are done, and Medusa-2's model to REPO-model"
    add("--push-to-hub", metavar="REPO", help=push)


def run(options: argparse.Namespace) -> None:
    """Load the model, prepare the rows, train the heads, save and upload them."""
    from transformers import AutoTokenizer

    dtype, accelerator = dtype_of(options), _accelerator(options)
    torch.manual_seed(options.seed)
    model = load_model(options.model, dtype, accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    require_decodable(model)
    report = RowReport(options.strict)
    training, validation = prepare(options, model, tokenizer, accelerator, report)
    if report.table():
        accelerator.print(report.table())
    learned = int((training.labels >= 0).sum())
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
    plain = {name: value for name, value in vars(options).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers("logs", plain | {"steps": settings.steps})
    dtype_of_heads = next(heads.parameters()).dtype
    accelerator.print(_machine(accelerator, model))
    records = train_medusa(model, heads.float(), training, options.output, settings, validation, accelerator, adapter)
    accelerator.end_training()
    if accelerator.is_main_process:
        told: dict = {"steps": settings.steps, "rows": len(training), "tokens learned": learned}
        told |= {"processes": accelerator.num_processes, "tokens a second": round(records[-1]["tokens_per_second"])}
        told |= plain
        save(options, model, tokenizer, heads.to(dtype_of_heads), adapter, validation, records, told)


def _accelerator(options: argparse.Namespace):
    from accelerate import Accelerator
    from accelerate.utils import is_tensorboard_available

    cuda, tracker = torch.cuda.is_available(), "tensorboard" if is_tensorboard_available() else None
    precision = options.precision or ("bf16" if cuda else "no")
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=options.output, cpu=not cuda)
    if tracker is None:
        accelerator.print("TensorBoard is not installed, so the log goes to log.json alone")
    return accelerator


def _machine(accelerator, model) -> str:
    """What the training runs on, in a line."""
    count, precision = accelerator.num_processes, accelerator.mixed_precision
    low = precision == "bf16" or model.dtype in (torch.bfloat16, torch.float16)
    return (
        f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}, the model in {_name(model.dtype)}, "
        f"the heads in float32 with the arithmetic of {'bfloat16' if low else 'float32'}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _settings(options: argparse.Namespace, rows: int) -> TrainingSettings:
    """The options that are settings of the training, with the steps that so many epochs of `rows` take."""
    same = ("batch", "rows_at_once", "lr", "warmup", "label_share", "joint_steps", "backbone_lr", "seed", "save_every",
            "log_every", "validate_every")  # fmt: skip
    steps = options.steps or max(1, math.ceil(options.epochs * rows / options.batch))
    return TrainingSettings(
        steps, self_distilled=options.self_distil, **{name: getattr(options, name) for name in same}
    )


def require_decodable(model) -> None:
    """Exit with one line that names the architecture if the generators cannot run this model."""
    try:
        ModelAdapter(model, coarse=quantises_activations(model))
    except UnsupportedArchitecture as error:
        raise SystemExit(f"error: nothing is trained, since decoding refuses this model: {error}") from error


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
    picture = draw(options.output, records)
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


def draw(folder: Path, records: Sequence[dict]) -> Path | None:
    """Loss, accuracies and tokens/s over the steps, as training.png; None without matplotlib."""
    pyplot = headless_pyplot()
    if pyplot is None:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for plot, one in zip((plot_loss, plot_training, plot_speed), axes, strict=True):
        plot(one, records)
    figure.savefig(folder / "training.png", dpi=120)
    pyplot.close(figure)
    return folder / "training.png"


def _calibration(options: argparse.Namespace, model: str) -> str:
    """The command that makes a tree for the heads that were trained."""
    data = options.validation or "HELD_OUT.jsonl"
    given = ["--model", model, *(["--tokenizer", options.tokenizer] if options.tokenizer else [])]
    given += ["--heads", str(options.output), "--data", str(data), *(["--self-distil"] if options.self_distil else [])]
    return shlex.join(["specdec", "calibrate", "--kind", "medusa", *given])


COMMAND = Command(parser, run)
