"""Many requests at once: the engine with and without drafts beside static batches and transformers' generate_batch.

    # two minutes on a CPU: 32 requests on the shipped pair, all there at once; then arrivals at several rates
    python -m scripts.bench_serving --bars --json scripts/results/serving_cpu.json
    python -m scripts.bench_serving --experiments load clients --methods plain draft --plots plots
    # the 8B shape on one H200, with random weights and drafts of a chosen acceptance (synthetic); cells that are done
    # stay in the folder, so a run may be cut and repeated
    python -m scripts.bench_serving --preset 8b --bars --folder runs/serving --seconds 500 --json result.json
    python -m scripts.bench_serving --preset 8b --experiments sweep --batches 1 8 --folder runs/serving
    # your own requests: {"arrival": 0.5, "prompt": "def add(", "output_tokens": 64} a line
    python -m scripts.bench_serving --trace requests.jsonl --experiments load
    # seconds: checks every path, its figures mean nothing
    python -m scripts.bench_serving --preset smoke

Experiments: `requests` (all there at once), `clients` (each sends its next request when the last one is answered),
`load` (Poisson arrivals, or the trace's own), `sweep` (how many run at the same time), `prefix` (requests that begin
alike), `int8` (rows in the same memory with 8-bit pages), `idle` (of a GPU, between kernels). Methods run in turn, back
and forth, on the same requests, greedily, after each has warmed up; a pass has a token of its own before all prompts,
so that no prefix of an earlier pass helps. Figures are medians of the passes, with the least and the most. What each
figure means is written in scripts/serving_bench/measures.py, what the roofline is in scripts/serving_bench/roofline.py.

Texts of all our methods are compared with those of the engine without drafts; those of transformers too, where rounding
may decide between tokens that nearly tie. A method that fails is a line with its error. Static batches hand over whole
texts, so they have no time to the first token. Without --json the last line is the result as JSON.
"""

import time
from collections.abc import Sequence

import torch
from transformers.utils import logging

from scripts.common.cells import measured
from scripts.common.entry import run_script
from scripts.generate_bench.models import load
from scripts.serving_bench.bars import bars
from scripts.serving_bench.experiments import cells
from scripts.serving_bench.methods import Bench
from scripts.serving_bench.options import options_of, settings_of
from scripts.serving_bench.plots import draw
from scripts.serving_bench.report import report
from specdec.cli.results import hand_over, make_result, write_result
from specdec.training.checkpoint import refuse_other_settings

CHOSEN = ("batches", "rates", "clients")  # may differ between parts of a run


def result_of(found: Sequence[dict], skipped: Sequence[str], settings: dict) -> dict:
    """The result file."""
    rows = [row for cell in found for row in cell["rows"]]
    roofline = next((cell["roofline"] for cell in found if cell.get("roofline")), None)
    return make_result(
        "serving", settings, rows, [record for cell in found for record in cell["records"]],
        bars=bars(rows, roofline, settings), roofline=roofline, skipped=list(skipped), complete=not skipped,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every cell of the chosen experiments that is not there yet, and print all."""
    began, options = time.perf_counter(), options_of(arguments, __doc__)
    settings = settings_of(options)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        fixed = {name: value for name, value in settings.items() if name not in CHOSEN}
        refuse_other_settings(options.folder / "settings.json", fixed)
    bench, found, skipped = Bench(load(options), options), [], []
    for name, cell in cells(bench):
        done = options.folder is not None and (options.folder / f"{name}.json").exists()
        if not done and time.perf_counter() - began > options.seconds:
            skipped.append(name)
            continue
        found.append(measured(options.folder, name, cell))
        print(f"{name}: {found[-1]['seconds']:.1f} s{', in an earlier run' * done}", flush=True)
        if options.json is not None:  # a run that is cut short keeps what it has
            write_result(result_of(found, skipped, settings), options.json)
    result = result_of(found, skipped, settings)
    print("\n" + report(result, options.bars))
    if options.plots is not None:
        print("\n".join(draw(result["methods"], options.plots)))
    hand_over(result, None if options.json is None else str(options.json))


if __name__ == "__main__":
    run_script(main)
