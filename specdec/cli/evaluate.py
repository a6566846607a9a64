"""`specdec evaluate`: methods of several models on tasks, from one YAML file or the command line."""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specdec.cli.command import Command, add_model_options, dtype_and_device, new_parser, quiet_transformers
from specdec.cli.kinds import describe_drafters, make_drafter, make_rule
from specdec.cli.prompts import tokenizer_in
from specdec.cli.results import make_result, write_result
from specdec.evaluation.harness import Loading, Share, evaluate, results_in
from specdec.evaluation.plan import ModelPlan, Plan, plan_of, read_plan
from specdec.evaluation.runs import record_of
from specdec.evaluation.summary import summarise, table_of
from specdec.loading import load_model
from specdec.model.runner import ModelRunner

ABOUT = """Compares methods x models x tasks x temperatures x batch sizes.

Every batch of prompts is decoded by all methods one after the other, from a cold start: plain decoding here,
transformers' own methods, and yours. Results lie in --output; the same command goes on where it was cut.
`accelerate launch -m specdec evaluate …` shares the prompts among processes. A YAML file says the same as options:

  models:
    mine: {target: DIR, methods: [DIR_OF_DRAFT, lookup, {drafter: DIR_OF_DRAFT, tree: auto}]}
  tasks: [shipped, mt_bench.jsonl]
  temperatures: [0, 1]
  batch_sizes: [1, 8]

Then: specdec report OUTPUT."""
LISTS = {"task": "tasks", "temperature": "temperatures", "batch": "batch_sizes"}
SINGLE = ("max_new_tokens", "repeats", "limit", "seed", "chat", "plain", "sampling", "top_k", "top_p", "warm_up",
          "threads", "device")  # fmt: skip


def parser(prog: str = "specdec evaluate") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, f"{ABOUT}\n\n{describe_drafters()}")
    add = options.add_argument
    add("plan", nargs="?", metavar="PLAN.yaml", help="settings; options come before them")
    add("--output", required=True, type=Path, help="folder of records and result.json")
    add("--target", help="folder or hub id, instead of a plan's models")
    add("--drafter", action="append", metavar="DRAFTER", help="see above; may be given again")
    add("--task", action="append", metavar="TASK", help="shipped, or a file of prompts; may be given again")
    add("--temperature", type=float, nargs="+", help="one or more; 0 is greedy (default: 0)")
    add("--batch", type=int, nargs="+", help="prompts at a time, one or more (default: 1)")
    add("--max-new-tokens", type=int, help="(default: 128)")
    add("--repeats", type=int, help="passes over all prompts (default: 3)")
    add("--limit", type=int, help="questions of each task, evenly (default: all)")
    add("--seed", type=int)
    add("--chat", action="store_true", default=None, help="texts are users' messages, for the chat template")
    add("--plain", action="store_true", default=None, help="messages are plain text, for models without a template")
    add("--sampling", choices=("stated", "model"), help="top-k and the like: as stated here (default), or the model's")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--no-transformers", action="store_true", help="leave transformers' own methods out")
    add("--warm-up", type=int, help="new tokens of calls before those that count (default: as many)")
    add("--threads", type=int, help="of the CPU, for all methods (default: torch's)")
    add_model_options(add)
    return options


def run(options: argparse.Namespace) -> None:
    """Measure what is missing; the main process writes the result and prints its table."""
    plan, share, device = _plan(options), _share(), None
    if share.count > 1:
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        share, device = Share(state.process_index, state.num_processes), state.device
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    quiet_transformers()
    loading = Loading(partial(_load, options, device), _drafter, make_rule)
    evaluate(plan, options.output, loading, share, sys.stderr.isatty() or share.index == 0)
    if share.count > 1:
        state.wait_for_everyone()
    if share.index == 0:
        _finish(plan, options.output, share)


def _plan(options: argparse.Namespace) -> Plan:
    """The plan of a file with the options' settings in it."""
    settings: dict[str, Any] = {} if options.plan is None else read_plan(options.plan)
    if options.target is not None:
        settings["models"] = [{
            "target": options.target, "methods": options.drafter or [], "tokenizer": options.tokenizer,
            "dtype": options.dtype, "mode": options.mode,
        }]  # fmt: skip
    elif options.drafter:
        raise ValueError(f"--drafter {options.drafter[0]} needs --target; a plan lists the methods of its models")
    if "models" not in settings:
        raise ValueError("a plan with models, or --target, is needed")
    given = {LISTS.get(name, name): getattr(options, name) for name in (*LISTS, *SINGLE)}
    settings |= {name: value for name, value in given.items() if value is not None}
    plan = plan_of(settings)
    return replace(plan, transformers=False) if options.no_transformers else plan


def _share() -> Share:
    """The share of a process that `accelerate launch` or torchrun has started."""
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def _load(options: argparse.Namespace, device: torch.device | None, plan: ModelPlan) -> tuple[ModelRunner, Any]:
    dtype, usual = dtype_and_device(argparse.Namespace(dtype=plan.dtype, device=options.device))
    target = ModelRunner(load_model(plan.target, dtype, device or usual), mode=plan.mode)
    return target, tokenizer_in(plan.tokenizer or plan.target)


def _drafter(spec: str, target: ModelRunner, num_tokens: int | None):
    return make_drafter(spec, target, num_tokens=num_tokens)


def _finish(plan: Plan, folder: Path, share: Share) -> None:
    runs, about = results_in(folder)
    rows, notes = summarise(runs), [note for model in about.values() for note in model["notes"]]
    if any(row["identical"] is False for row in rows) and any(m["dtype"] != "float32" for m in about.values()):
        notes.append("NO: in 16 bits near-ties may go either way; specdec audit, or dtype float32, tells")
    settings = plan.as_dict() | {"processes": share.count}
    result = make_result("evaluation", settings, rows, [record_of(r) for r in runs], models=about, notes=notes)
    write_result(result, folder / "result.json")
    print(table_of(rows))
    print("\n".join(["", *notes, f"figures: {folder / 'result.json'}", f"next: specdec report {folder}"]))


COMMAND = Command(parser, run)
