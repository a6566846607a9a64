"""Train a target, its Medusa heads and a draft model on real source code; decode beside plain decoding.

    # half an hour on one H200
    python -m scripts.bench_medusa --output runs/medusa --json scripts/results/medusa_h200.json
    # seconds: checks the path, its figures mean nothing
    python -m scripts.bench_medusa --output runs/smoke --preset smoke --device cpu

Stages: corpus and tokenizer, target, heads, draft model, calibration of the tree, evaluation. Each resumes where an
interrupted run stopped. Whole packages are held out: prompts come from them alone, those of the calibration from other
files than those of the evaluation. Every prompt is decoded by all methods one after the other, in `--repeats` passes
over all prompts; of each prompt the pass of median time counts. With `--seconds` a run that would outlast its machine
writes the result of what it has and goes on when it is started again; more passes can be asked for likewise.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from medusa import MedusaGenerator, MedusaHeads
from scripts.common.entry import add_bars_option, run_script
from scripts.common.side_by_side import ALL, OURS, PLAIN, differences, records, run_all, show, summarise
from scripts.medusa_bench.corpus import make_corpus
from scripts.medusa_bench.models import TREE_SIZE, make_calibration, make_draft, make_heads, make_target
from scripts.medusa_bench.presets import PRESETS
from specdec import AutoregressiveGenerator, ModelDrafter, SpeculativeGenerator
from specdec.info import commit, environment
from specdec.loading import load_model
from specdec.model.modes import MODES
from specdec.report.terminal import table
from specdec.training.checkpoint import refuse_other_settings, write_json
from specdec.trees.tree import TokenTree

TEMPERATURES = (0.0, 0.7)
MEDUSA, DRAFT, GAMMA = "specdec Medusa", "specdec draft model", 5


def stage(folder, name, make):
    """The dictionary that `make()` returns, with its seconds; kept in `folder`/name.json for later runs."""
    path = folder / f"{name}.json"
    if not path.exists():
        began = time.perf_counter()
        write_json({**make(), "seconds": time.perf_counter() - began}, path)
    record = json.loads(path.read_text())
    print(f"{name}: {record['seconds']:.1f} s", flush=True)
    return record


def bars(rows):
    """What is asked, and what was measured; batch 1, greedy, over all kinds."""
    of = {(row["method"], row["kind"]): row for row in rows if (row["batch"], row["temperature"]) == (1, 0.0)}
    row, draft, ours = of[MEDUSA, ALL], of.get((DRAFT, "code")), "wall clock over our autoregressive generator, greedy"
    judged = [
        ("tokens per round, greedy, batch 1", row["tokens_per_round"], 2.2),
        (f"{ours}, batch 1", row["over_ours"]["pooled"], 1.7),
        ("wall clock over transformers generate, greedy, batch 1", row["over_transformers"]["pooled"], 1.7),
    ]
    if draft is not None:
        judged.append((f"draft model, γ {GAMMA}: {ours}, batch 1, code", draft["over_ours"]["pooled"], 2.0))
    return [{"what": what, "value": value, "at_least": asked, "met": value >= asked} for what, value, asked in judged]


def bar_table(judged):
    """Asked, measured, and the verdict."""
    verdict = {True: "met", False: "NOT MET"}
    lines = [[b["what"], f">= {b['at_least']:g}", f"{b['value']:.2f}", verdict[b["met"]]] for b in judged]
    return table(["figure", "asked", "measured", ""], lines)


def options_of(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--output", type=Path, required=True, help="folder for checkpoints and everything measured")
    packages = Path(torch.__file__).parents[1]
    add("--packages", type=Path, default=packages, help="folder of Python packages (default: torch's)")
    add("--stdlib", type=Path, help="standard library source (default: this interpreter's)")
    add("--preset", choices=PRESETS, default="full")
    for name, what in (
        ("max-bytes", "bytes of source"),
        ("target-steps", "steps of its training"),
        ("heads-steps", "steps of theirs"),
        ("prompts", "prompts of each kind"),
        ("repeats", "passes over all prompts"),
    ):
        add(f"--{name}", type=int, metavar="N", help=f"{what} (default: the preset's)")
    seconds = "begin to decode no further prompt after so many seconds of this run"
    add("--seconds", type=float, default=float("inf"), help=seconds)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if cuda else "cpu")
    mode = "of our generators; each has a calibration and passes of its own"
    add("--mode", choices=MODES, default="graph" if cuda else "eager", help=mode)
    add("--json", type=Path, metavar="FILE", help="the result (default: result-MODE.json in the output folder)")
    add_bars_option(parser)
    return parser.parse_args(arguments)


def make_stages(options, preset, folder, device, seed, stage=stage, with_draft=True):
    """Train and calibrate what is not there yet; returns ({stage: its record}, model, tokenizer, heads, draft).

    stage: runs each, as the function of that name. Without a draft, `draft` is None."""
    corpus = stage(folder, "corpus", lambda: make_corpus(preset, options.packages, options.stdlib, folder, seed))
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    target = stage(folder, "target", lambda: make_target(preset, folder, tokenizer, device, seed))
    model = load_model(folder / "target", torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    training = stage(folder, "heads", lambda: make_heads(preset, model, folder, seed))
    heads = MedusaHeads.from_pretrained(folder / "heads", model.dtype).to(device)
    stages, draft = {"corpus": corpus, "target": target, "heads": training}, None
    if with_draft:
        stages["draft"] = stage(folder, "draft", lambda: make_draft(preset, model, folder, tokenizer, seed))
        draft = load_model(folder / "draft", model.dtype, device)
    calibrate = lambda: make_calibration(preset, model, heads, tokenizer, folder, options.mode)
    stages["calibration"] = stage(folder, f"calibration-{options.mode}", calibrate)
    return stages, model, tokenizer, heads, draft


def methods_of(model, heads, draft, choices, mode):
    """`{name: generate}` of all methods; `choices` are those of the calibrated tree."""
    ours, tree = AutoregressiveGenerator(model, mode=mode), TokenTree.from_choices([tuple(path) for path in choices])
    return {
        PLAIN: model.generate,
        OURS: ours.generate,
        MEDUSA: MedusaGenerator(ours.target, heads, tree).generate,
        DRAFT: SpeculativeGenerator(ours.target, ModelDrafter(draft, GAMMA)).generate,
    }


def opened(options):
    """(The preset with what the command line changes, the device), after checking that the folder is of this run."""
    folder, device, seed = options.output, torch.device(options.device), options.seed
    preset = {name: vars(options).get(name) or value for name, value in PRESETS[options.preset].items()}
    del preset["repeats"]  # more can be asked for later
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"packages": str(options.packages), "stdlib": str(options.stdlib)}
    refuse_other_settings(folder / "settings.json", {"settings": preset, "seed": seed, **sources})
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        torch.set_num_threads(1)
    return preset, device


def main(arguments=None):
    """Run all stages; see the module's docstring."""
    began, options = time.perf_counter(), options_of(arguments)
    folder, seed, repeats = options.output, options.seed, options.repeats or PRESETS[options.preset]["repeats"]
    preset, device = opened(options)
    stages, model, tokenizer, heads, draft = make_stages(options, preset, folder, device, seed)
    methods = methods_of(model, heads, draft, stages["calibration"]["choices"], options.mode)
    asked = json.loads((folder / "prompts.json").read_text())["evaluation"]
    prompts = {kind: [prompt["text"] for prompt in chosen] for kind, chosen in asked.items()}
    runs, complete = run_all(
        methods, tokenizer, prompts, TEMPERATURES, preset["tokens"], repeats, folder / f"runs-{options.mode}.jsonl",
        device, seed, began + options.seconds,
    )  # fmt: skip
    if not runs:
        raise SystemExit(
            f"no prompt was begun within --seconds {options.seconds:g}; the stages before are done, run again to go on"
        )
    rows, pairs = summarise(runs, methods, TEMPERATURES, prompts), [(MEDUSA, OURS), (MEDUSA, PLAIN), (OURS, PLAIN)]
    found, judged = differences(model, tokenizer, runs, prompts, [*pairs, (DRAFT, OURS)]), bars(rows)
    show(rows, found)
    if options.bars:
        print("\n" + bar_table(judged))
    seconds = {name: record.pop("seconds") for name, record in stages.items()}
    seconds["evaluation"] = sum(run["seconds"] for run in runs)
    spent = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"\nseconds: {spent}" + ("" if complete else "; the evaluation is NOT complete"))
    settings = {
        "preset": options.preset, **preset, "mode": options.mode, "temperatures": TEMPERATURES, "repeats": repeats,
        "tree_size": TREE_SIZE, "seed": seed,
    }  # fmt: skip
    versions = environment()
    result = {
        "schema": 1, "environment": versions, "device": versions["device"], "git_sha": commit(), "settings": settings,
        **stages, "rows": rows, "differences": found, "bars": judged, "prompts": records(runs), "complete": complete,
        "seconds": seconds,
    }  # fmt: skip
    write_json(result, options.json or folder / f"result-{options.mode}.json")


if __name__ == "__main__":
    run_script(main)
