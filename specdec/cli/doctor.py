"""`specdec doctor`: what to expect of a drafter on this machine, before anything is run from end to end."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specdec.cli.command import (
    Command,
    add_model_options,
    dtype_and_device,
    new_parser,
    quiet_transformers,
    require_at_least_one,
)
from specdec.cli.kinds import describe_drafters, make_drafter
from specdec.cli.prompts import load_tokenizer
from specdec.cli.results import hand_over, make_result, read_result, write_result
from specdec.evaluation.diagnosis import Diagnosis, ShapeCosts
from specdec.evaluation.doctor import Patient, examine
from specdec.evaluation.doctor_tables import doctor_notes, doctor_tables
from specdec.evaluation.figures.diagnosis import figures_of_diagnosis
from specdec.evaluation.figures.draw import save
from specdec.evaluation.measure import Bench, jobs_of, run_all
from specdec.evaluation.methods import OURS, ours
from specdec.evaluation.questions import Question, read_questions, shipped_questions, some_of
from specdec.evaluation.reporting import environment_of
from specdec.evaluation.sampling import notes_on, settings_for, used_by_ours
from specdec.evaluation.summary import summarise
from specdec.evaluation.texts import Texts
from specdec.generation.generators import AutoregressiveGenerator, SpeculativeGenerator
from specdec.loading import load_model
from specdec.model.runner import ModelRunner
from specdec.report.comparison_plots import palette
from specdec.report.headless import NOT_DRAWN, headless_pyplot
from specdec.report.terminal import table
from specdec.trees.tree import TokenTree

ABOUT = """What to expect of a drafter with your target, prompts and machine, and why.

Measures the cost of a draft step, of verifying 1 … 64 tokens and of whole rounds, and acceptance by position and kind,
on every other prompt; then says which length or tree is best at each batch size, where speculation stops paying, and
which fast paths the models do not get. With --check the other prompts are decoded afterwards, and compared."""


def parser(prog: str = "specdec doctor") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, f"{ABOUT}\n\n{describe_drafters()}")
    add = options.add_argument
    add("--target", help="folder or hub id")
    add("--drafter", metavar="DRAFTER", help="see above")
    add("--prompts", metavar="FILE", help="of the kinds that specdec evaluate reads (default: 16 that ship)")
    add("--limit", type=int, default=16, help="prompts to take, evenly from the file; half of them calibrate")
    add("--chat", action="store_true", help="texts are users' messages, for the tokenizer's chat template")
    add("--num-tokens", type=int, help="draft length γ (default: the drafter's)")
    add("--batch", type=int, nargs="+", default=[1, 4, 16], help="prompts at a time")
    add("--max-new-tokens", type=int, default=64)
    add("--temperature", type=float, default=0.0)
    add("--no-trees", action="store_true", help="try chains alone")
    add("--check", action="store_true", help="decode the other prompts afterwards, and compare")
    add("--repeats", type=int, default=3, help="of --check")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="of the CPU (default: torch's)")
    add_model_options(add)
    add("--plot", default="specdec_doctor.png", metavar="FILE", help="where the figure goes")
    add("--json", metavar="FILE", help="where the figures go (default: to standard output if that is no terminal)")
    add("--from", dest="source", metavar="FILE", help="print and draw an earlier --json FILE; nothing is measured")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, predict, print and draw; then, on request, compare with whole calls."""
    if options.source is not None:
        result = read_result(options.source, "doctor")
        _print(result)
        return plot(result, options.plot)
    if options.target is None or options.drafter is None:
        raise ValueError("--target and --drafter are needed, or --from FILE")
    require_at_least_one(options, "num_tokens", "max_new_tokens", "repeats", "limit", "threads")
    if min(options.batch) < 1 or options.limit < 2:
        raise ValueError(f"--batch must be at least 1 and --limit at least 2, got {options.batch} and {options.limit}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    patient, calibration, others = _admit(options)
    diagnosis = examine(patient, calibration, options.batch, not options.no_trees, sys.stderr.isatty())
    settings = {name: value for name, value in vars(options).items() if name not in ("plot", "json", "source")}
    explained = SpeculativeGenerator(patient.target, patient.drafter).explain()
    used = used_by_ours(patient.target.model, patient.sampling)
    more = {"diagnosis": diagnosis.as_dict(), "explained": explained, "sampling": used}
    more |= {"notes": notes_on(patient.target.model, used), "check": []}
    result = make_result("doctor", settings, diagnosis.lines(), [], **more)
    if options.json is not None:  # the prediction is written before anything is run from end to end
        write_result(result, options.json)
    if options.check:
        result["check"] = _check(patient, diagnosis, others, options)
    _print(result)
    plot(result, options.plot)
    hand_over(result, options.json)


def _admit(options: argparse.Namespace) -> tuple[Patient, list[Question], list[Question]]:
    """The models, and every other question for calibration."""
    dtype, device = dtype_and_device(options)
    quiet_transformers()
    target = ModelRunner(load_model(options.target, dtype, device), mode=options.mode)
    drafter = make_drafter(options.drafter, target, num_tokens=options.num_tokens)
    texts = Texts(load_tokenizer(options), device, options.chat)
    questions = shipped_questions() if options.prompts is None else read_questions(options.prompts)
    questions = some_of(questions, options.limit)
    if len(questions) < 2:
        raise ValueError(f"{options.prompts} must hold at least 2 prompts: one calibrates, one checks")
    sampling = settings_for(target.model, options.temperature)
    patient = Patient(target, drafter, texts, sampling, options.max_new_tokens, options.seed)
    return patient, questions[::2], questions[1::2]


def _check(patient: Patient, diagnosis: Diagnosis, questions: Sequence[Question],
           options: argparse.Namespace) -> list[dict[str, Any]]:  # fmt: skip
    """Predicted and measured speedups of whole calls, of the drafter's own shape and the best ones."""
    found = []
    mixed = [Question("others", number, one.turns) for number, one in enumerate(questions)]  # batches of all kinds
    sampling = partial(settings_for, patient.target.model)
    for batch in diagnosis.batches:
        shapes = {shape.name: shape for shape in (diagnosis.shapes[0], *_best_of_each(diagnosis, batch))}
        methods = {OURS: ours(AutoregressiveGenerator(patient.target))}
        for name, shape in shapes.items():
            tree = None if shape.parents is None else TokenTree(shape.parents)
            methods[name] = ours(SpeculativeGenerator(patient.target, patient.drafter, tree=tree))
        bench = Bench(methods, patient.texts, sampling, options.max_new_tokens)
        jobs = jobs_of(mixed, [options.temperature], options.repeats, options.seed, [batch])
        for row in summarise(run_all(bench, jobs, None)):
            if row["kind"] == "all" and row["name"] in shapes:
                predicted = diagnosis.speedup(shapes[row["name"]], batch)
                kept = {
                    name: row[name] for name in ("name", "batch", "speedup", "speedup_interval", "tokens_per_round")
                }
                found.append(kept | {"predicted": predicted, "off": predicted / row["speedup"] - 1})
    return found


def _best_of_each(diagnosis: Diagnosis, batch: int) -> list[ShapeCosts]:
    """The best chain and the best tree."""
    best = []
    for kind in ("chain", "tree"):
        shapes = [shape for shape in diagnosis.shapes if shape.name.startswith(kind)]
        best += [max(shapes, key=lambda shape: diagnosis.speedup(shape, batch))] if shapes else []
    return best


def _print(result: dict) -> None:
    for title, header, lines in doctor_tables(result):
        print(f"{title}\n{table(header, lines)}\n")
    print("\n".join([*doctor_notes(result), "", result["explained"]]))


def plot(result: dict, path: str) -> None:
    """Draw acceptance, costs, a round's parts, and expected speedups by length and batch size."""
    if headless_pyplot() is None:
        print(NOT_DRAWN, file=sys.stderr)
        return
    with palette():
        _, figure = next(figures_of_diagnosis(result))
        save(figure, Path(path), environment_of(result))
    print(f"plot: {path}")


COMMAND = Command(parser, run)
