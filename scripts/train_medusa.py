"""Train Medusa heads for a model of your own.

    python -m scripts.train_medusa --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR python -m scripts.train_medusa
    --model DIR_OR_HUB_ID --data FILE.jsonl --output DIR --self-distil --temperature 0 0.7 accelerate launch
    --num_processes 2 -m scripts.train_medusa --model … --data … --output … --batch 64

Rows of the data are {"messages": […]}, {"text": …} or ShareGPT's {"conversations": […]}; chats are learned where the
assistant speaks. With
--self-distil the model first writes the answers itself, which is what heads learn best from. --joint-steps makes it
 Medusa-2: after the
heads alone the model learns too, through LoRA, and is written to DIR/model. A killed run goes on where its last
checkpoint is, with the same
command. DIR gets the heads, a model card, accuracies.json, log.json and, where TensorBoard is installed, its logs. With
--push-to-hub REPO
the heads go to the hub when all that is done, and Medusa-2's model with its tokenizer to REPO-model; the same command
repeats a failed upload.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import medusa
from attention import ModelAdapter, UnsupportedArchitecture
from medusa.adapter import add_lora
from medusa.card import model_card
from specdec.loading import load_model
from specdec.training.checkpoint import write_json
from specdec.training.data import Rows, build_rows, read_rows
from specdec.training.self_distillation import read_answers, self_distil


def parser() -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder or hub id")
    options.add_argument("--tokenizer", help="folder or hub id (default: the model's)")
    options.add_argument("--data", type=Path, required=True, help="jsonl, or ShareGPT's json")
    options.add_argument(
        "--validation", type=Path, help="jsonl of the same kinds (default: --validation-share of the data)"
    )
    options.add_argument("--validation-share", type=float, default=0.02)
    options.add_argument(
        "--validation-rows", type=int, default=64, help="rows of tokens that accuracies are measured on, at most"
    )
    options.add_argument("--output", type=Path, required=True)
    options.add_argument(
        "--start",
        metavar="HEADS",
        help="folder or hub id of heads to go on from; they keep their number, layers and output",
    )
    options.add_argument("--heads", type=int, default=5)
    options.add_argument("--layers", type=int, default=1, help="residual blocks a head")
    options.add_argument("--output-layer", choices=("own", "shared", "low_rank"), default="own")
    options.add_argument("--rank", type=int, help="of low_rank")
    options.add_argument("--length", type=int, default=2048, help="tokens a row")
    options.add_argument("--no-packing", action="store_true", help="one text a row")
    options.add_argument("--epochs", type=float, default=2.0)
    options.add_argument("--steps", type=int, help="instead of epochs")
    options.add_argument("--batch", type=int, default=16, help="rows a step, over all processes")
    options.add_argument(
        "--rows-at-once", type=int, default=4, help="rows a forward of a process: the rest of its rows is accumulated"
    )
    options.add_argument("--lr", type=float, help="of the heads (default 1e-3, with --joint-steps 2e-3)")
    options.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    options.add_argument("--label-share", type=float, default=1.0, help="share of the labels learned in each step")
    options.add_argument(
        "--joint-steps", type=int, default=0, help="Medusa-2: so many of the steps, at the end, train the model too"
    )
    options.add_argument("--backbone-lr", type=float, default=5e-4)
    options.add_argument("--gradient-checkpointing", action="store_true", help="of the model, for joint steps")
    options.add_argument("--self-distil", action="store_true", help="let the model write the answers first")
    options.add_argument("--max-new-tokens", type=int, default=512, help="of an answer")
    options.add_argument("--prompt-tokens", type=int, default=64, help="of a text, that are its prompt")
    options.add_argument(
        "--temperature", type=float, nargs="+", default=[0.7], help="of the answers, batch by batch in turn"
    )
    options.add_argument("--answer-batch", type=int, default=32)
    options.add_argument("--dtype", default="auto", help="of the model: auto, float32, bfloat16 or float16")
    options.add_argument(
        "--precision", choices=("no", "bf16"), help="of the heads' arithmetic (default: bf16 on a GPU)"
    )
    options.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    options.add_argument("--validate-every", type=int, default=200)
    options.add_argument("--log-every", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the heads when they are done, and Medusa-2's model to REPO-model"
    )
    return options


def split(rows: list[dict], options) -> tuple[list[dict], list[dict]]:
    """(training, validation): every so many rows one is held out, unless --validation names a file."""
    if options.validation is not None:
        return rows, read_rows(options.validation)
    if not 0 < options.validation_share < 1 or len(rows) < 2:
        raise ValueError(
            "--validation-share must lie between 0 and 1, and the data have two rows or more, got "
            f"{options.validation_share} and {len(rows)}"
        )
    every = max(2, round(1 / options.validation_share))
    held = set(range(every - 1, len(rows), every)) or {len(rows) - 1}
    return [row for number, row in enumerate(rows) if number not in held], [rows[number] for number in sorted(held)]


def prepare(options, model, tokenizer, accelerator) -> tuple[Rows, Rows]:
    """Rows of tokens to train and to validate on, answered by the model first where that was asked for."""
    parts = dict(zip(("training", "validation"), split(read_rows(options.data), options), strict=True))
    for name, rows in parts.items() if options.self_distil else ():
        folder = options.output / f"answers_{name}"
        self_distil(
            model,
            tokenizer,
            rows,
            folder,
            options.max_new_tokens,
            options.temperature,
            options.answer_batch,
            options.prompt_tokens,
            options.seed,
            options.length,
            (accelerator.process_index, accelerator.num_processes),
            accelerator.is_main_process,
        )
        accelerator.wait_for_everyone()
        parts[name] = read_answers(folder)
    training, validation = (
        build_rows(rows, tokenizer, options.length, not options.no_packing) for rows in parts.values()
    )
    return training, validation.take(slice(0, options.validation_rows))


def require_decodable(model) -> None:
    """End with a line that names the architecture where decoding would refuse the model, and so its heads."""
    try:
        ModelAdapter(model)
    except UnsupportedArchitecture as error:
        raise SystemExit(f"error: nothing is trained, since decoding refuses this model: {error}") from error


def continued(name: str, model) -> medusa.MedusaHeads:
    """The heads in a folder or on the hub, for `model`; raises ValueError where they do not fit it."""
    like = medusa.MedusaHeads.for_model(model, 1, output="shared")  # the smallest that are made for it
    heads, config = medusa.MedusaHeads.from_pretrained(name), like.config
    if (heads.config.vocab_size, heads.config.hidden_size) != (config.vocab_size, config.hidden_size):
        sizes = (heads.config.vocab_size, heads.config.hidden_size), (config.vocab_size, config.hidden_size)
        raise ValueError(f"the heads in {name} are for a model of [V, H] {sizes[0]}, this one has {sizes[1]}")
    heads.config = replace(heads.config, base_model=config.base_model, base_revision=config.base_revision)
    return heads.to(next(like.parameters()))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from accelerate import Accelerator
    from accelerate.utils import is_tensorboard_available
    from transformers import AutoTokenizer

    options = parser().parse_args(arguments)
    precision = options.precision or ("bf16" if torch.cuda.is_available() else "no")
    tracker = "tensorboard" if is_tensorboard_available() else None
    accelerator = Accelerator(
        mixed_precision=precision, log_with=tracker, project_dir=options.output, cpu=not torch.cuda.is_available()
    )
    if tracker is None:
        accelerator.print("TensorBoard is not installed, so the log goes to log.json alone")
    torch.manual_seed(options.seed)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model, tokenizer = (
        load_model(options.model, dtype, accelerator.device),
        AutoTokenizer.from_pretrained(options.tokenizer or options.model),
    )
    require_decodable(model)
    training, validation = prepare(options, model, tokenizer, accelerator)
    learned = int((training.labels >= 0).sum())
    accelerator.print(
        f"{len(training)} rows of {training.tokens.shape[1]} tokens, {learned:,} of them learned; "
        f"{len(validation)} rows to validate on"
    )

    if options.start is None:
        heads = medusa.MedusaHeads.for_model(model, options.heads, options.layers, options.output_layer, options.rank)
    else:
        heads = continued(options.start, model)
    adapter = add_lora(model) if options.joint_steps else None
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    steps = options.steps or max(1, math.ceil(options.epochs * len(training) / options.batch))
    settings = medusa.TrainingSettings(
        steps,
        options.batch,
        options.rows_at_once,
        options.lr,
        options.warmup,
        label_share=options.label_share,
        joint_steps=options.joint_steps,
        backbone_lr=options.backbone_lr,
        self_distilled=options.self_distil,
        seed=options.seed,
        save_every=options.save_every,
        log_every=options.log_every,
        validate_every=options.validate_every,
    )
    plain = {name: value for name, value in vars(options).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers("logs", plain | {"steps": steps})
    dtype_of_heads = next(heads.parameters()).dtype
    records = medusa.train_medusa(
        model, heads.float(), training, options.output, settings, validation, accelerator, adapter
    )
    accelerator.end_training()
    if accelerator.is_main_process:
        training = {"steps": steps, "rows": len(training), "tokens learned": learned, **plain}
        save(options, model, tokenizer, heads.to(dtype_of_heads), adapter, validation, records, training)


def save(options, model, tokenizer, heads, adapter, validation: Rows, records: list[dict], training: dict) -> None:
    """Heads, card, accuracies, log and, for Medusa-2, the model with its adapter merged in; then the upload, where it
    was asked for.
    """
    if adapter is not None:
        model = adapter.merge_and_unload()
        model.save_pretrained(options.output / "model")
        tokenizer.save_pretrained(options.output / "model")
        heads.config = replace(
            heads.config, base_model=str(options.output / "model"), base_revision=None
        )  # they go with no other
    accuracies = medusa.head_ranks(heads, model, validation).accuracies()
    write_json({"accuracies": accuracies, "rows": len(validation)}, options.output / "accuracies.json")
    write_json(records, options.output / "log.json")
    heads.save_pretrained(options.output, model_card(heads, accuracies, training))
    if options.push_to_hub:  # last, so that one that fails loses nothing
        if adapter is not None:
            heads.config = replace(
                heads.config, base_model=push_model(model, tokenizer, f"{options.push_to_hub}-model")
            )
        print(heads.push_to_hub(options.push_to_hub, model_card(heads, accuracies, training)))
    last = records[-1]
    print(
        json.dumps({"loss": last["loss"]} | {name: round(value, 4) for name, value in last.items() if "_top_" in name})
    )


def push_model(model, tokenizer, repo: str) -> str:
    """Upload a model with its tokenizer; returns the repository's full name, which has an owner where `repo` leaves it
    out.
    """
    from huggingface_hub import HfApi

    repo = HfApi().create_repo(repo, exist_ok=True).repo_id
    model.push_to_hub(repo)
    tokenizer.push_to_hub(repo)
    return repo


if __name__ == "__main__":
    main()
