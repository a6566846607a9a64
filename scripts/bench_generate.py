"""Whole generation runs held beside transformers': every method in a process of its own, one after the other, in one
run.

    python -m scripts.bench_generate --shape llama-3.1-8b --json scripts/results/generate_h200.json python -m
    scripts.bench_generate --shape llama-3.1-8b --seconds 540 --records /tmp/records    # again and again, until nothing
    is skipped python -m scripts.bench_generate --shape llama-3.1-8b --acceptance 0.7 --methods autoregressive-graph
    chain-graph python -m scripts.bench_generate --shape llama-3.1-8b --methods long-run-graph --long-run 10000 python
    -m scripts.bench_generate --model DIR_OR_HUB_ID --draft DIR_OR_HUB_ID --prompts texts.jsonl python -m
    scripts.bench_generate --shape toy --device cpu --batch 1 2 --prompt 16 --new-tokens 24   # the path; its figures
    mean nothing

A shape has random weights, and its draft is exactly right by construction: a synthetic control that says what
speculation costs, not how often a real draft is right (see scripts/generate_bench/models.py; `--weights counting`
leaves no near-ties in bf16, `--acceptance` plants wrong drafts in our chains). Greedy decoding throughout, end-of-text
tokens ignored. A speed is that of whole calls, prompt included: medians of `--repeats` calls after two that do not
count. Parts of a round are timed on the device, each by itself (scripts/generate_bench/rounds.py); host is what they
leave of a round's wall time in the run. Every method's text is compared with that of our eager autoregressive one.

A process that fails or takes longer than `--method-seconds` leaves the rows that it had, and the others go on. What
torch.compile keeps on disk is shared by all, so the first call of a later process may find it there. The last line is
the result as JSON."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from scripts.common.result_files import git_sha, one_line
from scripts.generate_bench.audit import compare, explain
from scripts.generate_bench.methods import (
    ASSISTED,
    COSTS,
    EAGER,
    LONG_RUN,
    LOOKUP,
    METHODS,
    ROOFLINE,
    STATIC,
    NotAvailable,
    measure,
)
from scripts.generate_bench.models import SHAPES, TINY, WEIGHTS, load
from scripts.generate_bench.report import bars, report
from specdec.info import environment
from specdec.training.checkpoint import write_json

AUDIT = "audit"
# what matters most comes first
FIRST = (
    ROOFLINE,
    EAGER,
    STATIC,
    "autoregressive-graph",
    "chain-graph",
    ASSISTED,
    f"{COSTS}-graph",
    "autoregressive-eager",
    "medusa-graph",
    "tree-graph",
    "autoregressive-compile",
    "chain-compile",
    "medusa-compile",
    "tree-compile",
    "lookup-graph",
    LOOKUP,
    "chain-eager",
    "medusa-eager",
    "tree-eager",
    "lookup-eager",
    f"{COSTS}-eager",
    "lookup-compile",
    f"{COSTS}-compile",
)
PARENT = (
    "methods",
    "method",
    "records",
    "json",
    "seconds",
    "method_seconds",
    "compared",
)  # options that change no measurement


def settings_of(options) -> dict:
    """What a measurement depends on, ready for JSON."""
    return json.loads(
        json.dumps({name: value for name, value in vars(options).items() if name not in PARENT}, default=str)
    )


def child(options) -> None:
    """Measure one method and print its record after every row: the last whole line is all that is known."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.device == "cpu":
        torch.set_num_threads(1)
    record = {"method": options.method, "environment": environment(), "rows": [], "error": None}
    try:
        if options.method == AUDIT:
            rows = explain(load(options), options, **json.loads(options.compared.read_text()))
        else:
            rows = measure(options.method, options)
        for row in rows:
            record["rows"].append(row)
            print(json.dumps(record), flush=True)
    except Exception as error:
        traceback.print_exc()
        record["error"] = str(error) if isinstance(error, NotAvailable) else one_line(error)
    print(json.dumps(record), flush=True)


def run_child(method: str, arguments: Sequence[str], limit: float) -> dict:
    """The record of a process of its own, with its `seconds`; what a failed or too slow one printed last, with the
    `error`.
    """
    command = [sys.executable, "-m", "scripts.bench_generate", *arguments, "--method", method]
    began, problem = time.perf_counter(), None
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        # files, since compile workers that outlive their parent would keep a pipe open; a session, so that they end
        # with it
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, cwd=Path(__file__).parent.parent, start_new_session=True
        )
        try:
            status = process.wait(limit)
            if status:
                problem = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            problem = f"took longer than {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed, said = (read(file) for file in (out, errors))
    record = next(
        filter(None, map(record_in, reversed(printed))),
        {"method": method, "environment": None, "rows": [], "error": None},
    )
    if problem is not None:
        record["error"] = f"{problem}; last said: {said[-1]}" if said else problem
    return record | {"seconds": time.perf_counter() - began}


def read(file) -> list[str]:
    """The lines of an open file that are not blank."""
    file.seek(0)
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def record_in(line: str) -> dict | None:
    """The record that a line holds; None for other lines and for the half of one that a kill left."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and "method" in found else None


def kept(folder: Path | None, method: str, settings: dict) -> dict | None:
    """The record that an earlier run with the same settings left in `folder`."""
    path = None if folder is None else folder / f"{method}.json"
    if path is None or not path.exists():
        return None
    found = json.loads(path.read_text())
    return found["record"] if found["settings"] == settings else None


def keep(folder: Path | None, record: dict, settings: dict) -> None:
    """Leave a record for a later run, unless it failed."""
    if folder is not None and record["error"] is None:
        write_json({"settings": settings, "record": record}, folder / f"{record['method']}.json")


def audit(rows: Sequence[dict], arguments: Sequence[str], limit: float) -> tuple[list[dict], str | None]:
    """Compare all texts -> (what `explain` gives, or `compare` where it could not run, and why it could not)."""
    compared = compare(rows)
    if not any(entry["differences"] for entry in compared):
        return compared, None
    texts = {
        str(entry["batch"]): next(
            row["tokens"] for row in rows if (row["method"], row["batch"]) == (entry["reference"], entry["batch"])
        )
        for entry in compared
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"compared": compared, "texts": texts}, file)
        file.flush()
        record = run_child(AUDIT, [*arguments, "--compared", file.name], limit)
    return record["rows"] + compared[len(record["rows"]) :], record["error"]


def note_of(options) -> str:
    """What was measured, and what about it is synthetic."""
    if options.model is None:
        counting = " that count" if options.weights == "counting" else ""
        what = (
            f"Synthetic control: random weights{counting} in the shape {options.shape}; layers from "
            f"{options.draft_layers} on contribute zero, so that "
            f"the first {options.draft_layers} are an exactly right draft"
            + (
                ""
                if options.acceptance is None
                else f", into which our chains plant wrong tokens (acceptance {options.acceptance:g})"
            )
        )
    else:
        what = (
            f"Model {options.model}, draft {options.draft or ('the shipped one' if options.model == TINY else 'none')}"
        )
    return (
        f"{what}. {options.dtype} on {options.device}, γ {options.length}, {options.new_tokens} new tokens "
        "a text, greedy. Medusa heads are untrained."
    )


def result_of(
    records: Sequence[dict], skipped: Sequence[str], compared: Sequence[dict], options, sha: str | None
) -> dict:
    """The result file, also written to `options.json`: no texts, and an error row for every method that broke."""
    rows = [
        {name: value for name, value in row.items() if name != "tokens"} for record in records for row in record["rows"]
    ]
    rows += [
        {"method": record["method"], "batch": None, "error": record["error"]} for record in records if record["error"]
    ]
    settings = settings_of(options)
    found = {
        "schema": 1,
        "environment": next((record["environment"] for record in records if record["environment"]), None),
        "git_sha": sha,
        "settings": settings,
        "rows": rows,
        "audit": list(compared),
        "bars": bars(rows, compared, settings),
        "skipped": list(skipped),
        "seconds": {record["method"]: record["seconds"] for record in records},
        "note": note_of(options),
    }
    if options.json:
        write_json(found, options.json)
    return found


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES, default="llama-3.1-8b", help="random weights of this shape (default: %(default)s)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="random", help="of a shape (default: %(default)s)")
    parser.add_argument(
        "--draft-layers",
        type=int,
        default=2,
        help="layers of a shape that contribute, which are its draft (default: %(default)s)",
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        metavar="A",
        help="plant wrong tokens in our chains, so that each drafted token is right that often",
    )
    parser.add_argument(
        "--model", metavar="DIR_OR_HUB_ID", help='a model instead of a shape; "tiny" is the shipped pair'
    )
    parser.add_argument("--draft", metavar="DIR_OR_HUB_ID", help="its draft model")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='texts, a line each, plain or {"text": …} (default: those of the shipped pair)',
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="batch sizes (default: 1 8 32)"
    )
    for name, value, what in (
        ("prompt", 128, "prompt tokens, at most for texts"),
        ("new-tokens", 256, "new tokens a text"),
        ("length", 5, "γ, drafted tokens a round"),
        ("repeats", 5, "calls that count"),
        ("long-run", 0, "rounds of the long run; 0: none"),
        ("seed", 0, "of weights and prompts"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all that generate or cost)",
    )
    parser.add_argument(
        "--row-seconds",
        type=float,
        default=20.0,
        help="of the calls that count; two are always made (default: %(default)s)",
    )
    parser.add_argument("--method-seconds", type=float, default=300.0, help="of one process (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no further process after so many seconds of this run"
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="keep what a process measured here, and take it from here instead of measuring it again",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    parser.add_argument(
        "--method", choices=(*METHODS, AUDIT), help=argparse.SUPPRESS
    )  # this process measures one method
    parser.add_argument("--compared", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.acceptance is not None and (options.model is not None or not 0 <= options.acceptance <= 1):
        parser.error("--acceptance lies in [0, 1] and goes with a --shape, whose draft is exact")
    if (
        min(options.batch) < 1
        or options.new_tokens < 4
        or options.prompt < 2
        or options.length < 1
        or options.repeats < 1
    ):
        parser.error(
            "batch sizes, --length and --repeats must be at least 1, --prompt at least 2, --new-tokens at least 4"
        )
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.methods = options.methods or [*FIRST, *([f"{LONG_RUN}-graph"] if options.long_run else [])]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all methods and print what they gave; as a child, measure one."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, began = options_of(arguments), time.perf_counter()
    if options.method:
        return child(options)
    settings, sha, records, skipped, compared = settings_of(options), git_sha(), [], [], []
    for method in options.methods:
        record = found = kept(options.records, method, settings)
        if record is None and time.perf_counter() - began > options.seconds:
            skipped.append(method)
            continue
        if record is None:
            record = run_child(method, arguments, options.method_seconds)
            keep(options.records, record, settings)
        records.append(record)
        print(
            f"{method}: {record['seconds']:.0f} "
            f"s{', in an earlier run' if found else ''}{', ' + record['error'] if record['error'] else ''}",
            flush=True,
        )
        result_of(records, skipped, compared, options, sha)  # a run that is cut short keeps what it has
    if time.perf_counter() - began <= options.seconds:
        compared, problem = audit(
            [row for record in records for row in record["rows"]], arguments, options.method_seconds
        )
        if problem:
            print(f"{AUDIT}: {problem}", flush=True)
    else:
        compared = compare([row for record in records for row in record["rows"]])
        skipped.append(AUDIT)
    result = result_of(records, skipped, compared, options, sha)
    print("\n" + report(result) + "\n\n" + json.dumps(result))


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # a run that is told to end takes the process under way with it
    main()
