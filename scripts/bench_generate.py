"""Whole generation runs beside transformers': every method in a process of its own, one after the other, in one run.

    python -m scripts.bench_generate --shape llama-3.1-8b --json scripts/results/generate_h200.json
    # again and again, until nothing is skipped
    python -m scripts.bench_generate --shape llama-3.1-8b --seconds 540 --records /tmp/records
    python -m scripts.bench_generate --shape llama-3.1-8b --acceptance 0.7 --methods autoregressive-graph chain-graph
    python -m scripts.bench_generate --shape llama-3.1-8b --methods long-run-graph --long-run 10000
    python -m scripts.bench_generate --shape llama-3.1-8b --batch 1 --host-layers 16 --methods \
        autoregressive-eager chain-eager auto-eager
    python -m scripts.bench_generate --model DIR_OR_HUB_ID --draft DIR_OR_HUB_ID --prompts texts.jsonl
    # weights in 8 and 4 bits through torchao (scripts/common/quantise.py has the kinds)
    python -m scripts.bench_generate --shape llama-3.1-8b --target-quant int8 --draft-quant int4
    # checks the path; its figures mean nothing
    python -m scripts.bench_generate --shape toy --device cpu --batch 1 2 --prompt 16 --new-tokens 24

A shape has random weights, and its draft is exactly right by construction: a synthetic control that shows what
speculation costs, not how often a real draft is right (see scripts/generate_bench/models.py; `--weights counting`
leaves no near-ties in bf16, `--acceptance` plants wrong drafts in our chains). Greedy decoding throughout, end-of-text
tokens ignored. A speed is that of whole calls, prompt included: medians of `--repeats` calls after two that do not
count. Parts of a round are timed on the device, each by itself (scripts/generate_bench/rounds.py); host is what they
leave of a round's wall time in the run. Every method's text is compared with that of our eager autoregressive one. A
shape's draft shares the target's layers: where both are quantised alike it is as right as before, and otherwise it has
layers of its own and misses now and then.

A process that fails or takes longer than `--method-seconds` leaves the rows that it had, and the others go on. What
torch.compile keeps on disk is shared by all, so the first call of a later process may find it there. The last line is
the result as JSON.
"""

import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial

import torch
from transformers.utils import logging

from scripts.common.entry import one_line, run_script
from scripts.generate_bench.audit import compare, explain
from scripts.generate_bench.bars import bars
from scripts.generate_bench.methods import measure
from scripts.generate_bench.models import load, to_host, unpadded
from scripts.generate_bench.options import AUDIT, note_of, options_of, settings_of
from scripts.generate_bench.processes import keep, kept, run_child
from scripts.generate_bench.report import report
from scripts.generate_bench.speeds import NotAvailable
from specdec.info import commit, environment
from specdec.training.checkpoint import write_json


def child(options) -> None:
    """Measure one method and print its record after every row: the last whole line is all that is known."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.device == "cpu":
        torch.set_num_threads(1)
    record = {"method": options.method, "environment": environment(), "rows": [], "error": None}
    try:
        if options.method == AUDIT:
            models = load(options)
            to_host(models, options)
            before = partial(unpadded, models, options)
            rows = explain(models.target, before, **json.loads(options.compared.read_text()))
        else:
            rows = measure(options.method, options)
        for row in rows:
            record["rows"].append(row)
            print(json.dumps(record), flush=True)
    except Exception as error:
        traceback.print_exc()
        record["error"] = str(error) if isinstance(error, NotAvailable) else one_line(error)
    print(json.dumps(record), flush=True)


def audit(rows: Sequence[dict], arguments: Sequence[str], limit: float) -> tuple[list[dict], str | None]:
    """Compare all texts -> (what `explain` gives, or `compare` where it could not run, and why it could not)."""
    compared = compare(rows)
    if not any(entry["differences"] for entry in compared):
        return compared, None
    written = {(row["method"], row["batch"]): row["tokens"] for row in rows if "tokens" in row}
    texts = {str(entry["batch"]): written[entry["reference"], entry["batch"]] for entry in compared}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"compared": compared, "texts": texts}, file)
        file.flush()
        record = run_child(AUDIT, [*arguments, "--compared", file.name], limit)
    return record["rows"] + compared[len(record["rows"]) :], record["error"]


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all methods and print what they gave; as a child, measure one."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, began = options_of(arguments, __doc__), time.perf_counter()
    if options.method:
        return child(options)
    settings, sha, records, skipped, compared = settings_of(options), commit(), [], [], []
    for method in options.methods:
        record = found = kept(options.records, method, settings)
        if record is None and time.perf_counter() - began > options.seconds:
            skipped.append(method)
            continue
        if record is None:
            record = run_child(method, arguments, options.method_seconds)
            keep(options.records, record, settings)
        records.append(record)
        remarks = ["in an earlier run"] * bool(found) + [record["error"]] * bool(record["error"])
        print(", ".join([f"{method}: {record['seconds']:.0f} s", *remarks]), flush=True)
        result_of(records, skipped, compared, options, sha)  # a run that is cut short keeps what it has
    rows = [row for record in records for row in record["rows"]]
    if time.perf_counter() - began <= options.seconds:
        compared, problem = audit(rows, arguments, options.method_seconds)
        if problem:
            print(f"{AUDIT}: {problem}", flush=True)
    else:
        compared = compare(rows)
        skipped.append(AUDIT)
    result = result_of(records, skipped, compared, options, sha)
    print("\n" + report(result, options.bars) + "\n\n" + json.dumps(result))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process under way ends with this one
    run_script(main)
