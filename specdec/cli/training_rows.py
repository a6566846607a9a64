"""From files to the model, and the rows of tokens, that a training takes: those to learn from, and those held out."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.cli.command import dtype_of
from specdec.cli.training_options import accelerator_of, require_decodable
from specdec.loading import load_model
from specdec.training.data import Rows, encode_rows, pack, require_known_tokens
from specdec.training.files import each_row
from specdec.training.kinds import good_rows
from specdec.training.report import RowReport
from specdec.training.self_distillation import prompts_of, read_answers, self_distil


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a command trains with: an `Accelerator`, the model and its tokenizer, rows to learn and to validate on."""

    accelerator: Any
    model: Any
    tokenizer: Any
    training: Rows
    validation: Rows

    @property
    def learned(self) -> int:
        """How many tokens of `training` have a label."""
        return int((self.training.labels >= 0).sum())


def load(options: argparse.Namespace, validation_rows: int) -> Loaded:
    """Load the model and prepare the rows, of which `validation_rows` are held out at most; says which were left out.

    Exits for a model that cannot be decoded with; raises ValueError for what `prepare` refuses."""
    from transformers import AutoTokenizer

    dtype, accelerator = dtype_of(options), accelerator_of(options)
    torch.manual_seed(options.seed)
    model = load_model(options.model, dtype, accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    require_decodable(model)
    report = RowReport(options.strict)
    training, validation = prepare(options, model, tokenizer, accelerator, report)
    if report.table():
        accelerator.print(report.table())
    return Loaded(accelerator, model, tokenizer, training, validation.take(slice(0, validation_rows)))


def split(rows: list, share: float) -> tuple[list, list]:
    """(training, validation): one row of every so many is held out."""
    if not 0 < share < 1 or len(rows) < 2:
        raise ValueError(
            "--validation-share must lie between 0 and 1, and the data have two rows or more that can be learned from, "
            f"got {share} and {len(rows)}"
        )
    every = max(2, round(1 / share))
    held = set(range(every - 1, len(rows), every)) or {len(rows) - 1}
    return [row for number, row in enumerate(rows) if number not in held], [rows[number] for number in sorted(held)]


def prepare(options: argparse.Namespace, model, tokenizer, accelerator, report: RowReport) -> tuple[Rows, Rows]:
    """Rows of tokens to train and to validate on; with --self-distil the model writes their answers first.

    Rows that cannot be learned from are left out before the split, and counted in `report`."""

    def prompting(row: dict) -> dict:
        prompts_of(row, tokenizer, options.prompt_tokens, options.length)  # raises where it has none
        return row

    def usable(path: Path) -> list:
        rows = each_row(path, report)
        if options.self_distil:
            found: list = list(good_rows(rows, prompting, report))
        else:
            found = encode_rows(rows, tokenizer, options.length, report)
        report.require(len(found), str(path))
        return found

    parts: Sequence[list] = [usable(path) for path in (options.data, options.validation) if path is not None]
    training, validation = split(parts[0], options.validation_share) if len(parts) == 1 else parts
    if options.self_distil:
        training, validation = (
            _answered(rows, options.output / f"answers_{name}", options, model, tokenizer, accelerator, report)
            for name, rows in (("training", training), ("validation", validation))
        )
    room = 0 if options.no_packing else options.length
    packed = [pack([piece for pieces in rows for piece in pieces], room) for rows in (training, validation)]
    for rows in packed:
        require_known_tokens(rows.tokens.unique().tolist(), tokenizer, model)
    return packed[0], packed[1]


def _answered(
    rows: list[dict], folder: Path, options: argparse.Namespace, model, tokenizer, accelerator, report: RowReport
) -> list:
    """The model's own answers to the prompts of `rows`, encoded; all processes write them together."""
    self_distil(
        model, tokenizer, rows, folder,
        max_new_tokens=options.max_new_tokens, temperatures=options.temperature, batch=options.answer_batch,
        prompt_tokens=options.prompt_tokens, seed=options.seed, max_length=options.length,
        share=(accelerator.process_index, accelerator.num_processes), progress=accelerator.is_main_process,
        report=report,
    )  # fmt: skip
    accelerator.wait_for_everyone()
    encoded = encode_rows(read_answers(folder), tokenizer, options.length, report)
    report.require(len(encoded), str(folder))
    return encoded
