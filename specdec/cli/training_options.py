"""What the commands that train drafters share: options, the accelerator, and lines about the run."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attention import ModelAdapter, UnsupportedArchitecture
from specdec.cli.command import add_dtype_option
from specdec.model.fusion.quantised.activations import quantises_activations

Add = Callable[..., Any]


def add_data(add: Add) -> None:
    """--model, --tokenizer, --data, --strict, --validation, --validation-share and --output."""
    add("--model", required=True, help="folder or hub id")
    add("--tokenizer", help="folder or hub id (default: the model's)")
    add("--data", type=Path, required=True, help="jsonl, or ShareGPT's json")
    strict = "stop at the first row that cannot be learned from; they are left out and counted otherwise"
    add("--strict", action="store_true", help=strict)
    add("--validation", type=Path, help="jsonl of the same kinds (default: --validation-share of the data)")
    add("--validation-share", type=float, default=0.02)
    add("--output", type=Path, required=True)


def add_steps(add: Add) -> None:
    """--length, --no-packing, --epochs, --steps, --batch and --rows-at-once."""
    add("--length", type=int, default=2048, help="tokens a row")
    add("--no-packing", action="store_true", help="one text a row")
    add("--epochs", type=float, default=2.0)
    add("--steps", type=int, help="instead of epochs")
    add("--batch", type=int, default=16, help="rows a step, over all processes")
    at_once = "rows a forward of a process: the rest of its rows is accumulated"
    add("--rows-at-once", type=int, default=4, help=at_once)


def add_answers(add: Add) -> None:
    """--self-distil and its options."""
    add("--self-distil", action="store_true", help="let the model write the answers first")
    add("--max-new-tokens", type=int, default=512, help="of an answer")
    add("--prompt-tokens", type=int, default=64, help="of a text, that are its prompt")
    add("--temperature", type=float, nargs="+", default=[0.7], help="of the answers, batch by batch in turn")
    add("--answer-batch", type=int, default=32)


def add_run(add: Add, what: str) -> None:
    """--dtype, --precision of `what`'s arithmetic, --save-every, --validate-every, --log-every and --seed."""
    add_dtype_option(add)
    precision = f"of the {what} arithmetic (default: bf16 on a GPU, else the model's)"
    add("--precision", choices=("no", "bf16"), help=precision)
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--validate-every", type=int, default=200)
    add("--log-every", type=int, default=10)
    add("--seed", type=int, default=0)


def accelerator_of(options: argparse.Namespace):
    """Hugging Face's `Accelerator` for --precision and --output, with TensorBoard where that is installed."""
    from accelerate import Accelerator
    from accelerate.utils import is_tensorboard_available

    cuda, tracker = torch.cuda.is_available(), "tensorboard" if is_tensorboard_available() else None
    precision = options.precision or ("bf16" if cuda else "no")
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=options.output, cpu=not cuda)
    if tracker is None:
        accelerator.print("TensorBoard is not installed, so the log goes to log.json alone")
    return accelerator


def steps_of(options: argparse.Namespace, rows: int) -> int:
    """--steps, or those that --epochs of so many rows take."""
    return options.steps or max(1, math.ceil(options.epochs * rows / options.batch))


def same_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that are settings of all networks' trainings, by the settings' names."""
    same = ("batch", "rows_at_once", "lr", "warmup", "patience", "seed", "save_every", "log_every", "validate_every")
    return {name: getattr(options, name) for name in same} | {"max_new_tokens": options.validation_tokens}


def announce(options: argparse.Namespace, accelerator, model, steps: int, what: str) -> dict:
    """Begin the trackers' log, and say what `what` is trained on; returns the options that are plain values."""
    plain = {name: value for name, value in vars(options).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers("logs", plain | {"steps": steps})
    accelerator.print(machine_line(accelerator, model, what))
    return plain


def machine_line(accelerator, model, what: str) -> str:
    """What the training of `what` runs on."""
    count, precision = accelerator.num_processes, accelerator.mixed_precision
    low = precision == "bf16" or model.dtype in (torch.bfloat16, torch.float16)
    return (
        f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}, the model in "
        f"{str(model.dtype).removeprefix('torch.')}, {what} in float32 with the arithmetic of "
        f"{'bfloat16' if low else 'float32'}"
    )


def require_decodable(model) -> None:
    """Exit with one line that names the architecture if the generators cannot run this model."""
    try:
        ModelAdapter(model, coarse=quantises_activations(model))
    except UnsupportedArchitecture as error:
        raise SystemExit(f"error: nothing is trained, since decoding refuses this model: {error}") from error
