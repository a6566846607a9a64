"""What each quantisation of weights, and of keys and values, costs: held-out loss, greedy agreement, acceptance.

    python -m scripts.bench_quantised --json scripts/results/quantised_cpu.json
    python -m scripts.bench_quantised --models tiny --quantisations int8 kv-fp8
    # seconds: checks every path, its figures mean nothing
    python -m scripts.bench_quantised --preset smoke

Targets: the shipped one ("tiny"), and one 512 wide that is trained on the spot ("wide", some minutes on one core).
Weights are rounded to the nearest through torchao (int8, int8 with dynamic activations, fp8, int4), or calibrated by
`scripts.calibrate_quantised` (GPTQ, AWQ, SmoothQuant): where llm-compressor is not installed, a checkpoint that it made
elsewhere is taken from `--folder`/MODEL-calibrated/METHOD, and without one a line says so. Keys and values are
quantised as they are written to pages. All else is float32, so that a figure is that of the quantisation alone; rows of
the table are independent of this machine's speed.

* loss: mean next-token loss in nats a token on windows of 512 tokens, spread over this Python's own held-out source
  (the wide model was trained on rows of 128); "added" is over that of the weights as they are.
* agreement: the share of positions of these windows after which the most likely next token is the unquantised float32
  model's, given the same, true tokens before (teacher forcing).
* acceptance: accepted of the proposed tokens of greedy chains of 5, and tokens a round with the target's own in
  brackets, on greedy texts after held-out prompts. Each target writes its own texts. The draft model and the Medusa
  heads are the shipped ones, as they are; the quantised self drafter rounds the layers that are not quantised yet to 4
  bits, in groups of 128 (wide) or 32 (tiny), and cannot be where there are none.

`--folder` keeps the wide model and every cell that is done, so a run may be cut, by `--seconds` too, and repeated.
Without --json the last line is the result as JSON.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging

from scripts.common.cells import measured
from scripts.common.entry import run_script
from scripts.generate_bench.speeds import NotAvailable
from scripts.quantised_bench.kinds import QUANTISATIONS
from scripts.quantised_bench.report import report
from scripts.quantised_bench.subjects import SUBJECTS, Sizes, subjects_of
from specdec.cli.results import hand_over, make_result, write_result
from specdec.training.checkpoint import refuse_other_settings

PRESETS = {
    "full": Sizes(windows=64, length=512, prompts=8, tokens=64, preset="full", every=1),
    "smoke": Sizes(windows=2, length=24, prompts=1, tokens=6, preset="smoke", every=60),
}


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [what.name for what in QUANTISATIONS]
    parser.add_argument("--preset", choices=PRESETS, default="full", help="sizes (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="default: both")
    parser.add_argument("--quantisations", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    text = "keep what is trained, calibrated and measured here (default: runs/quantised, or runs/quantised_smoke)"
    parser.add_argument("--folder", type=Path, metavar="DIR", help=text)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further cell after so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    options = parser.parse_args(arguments)
    options.folder = options.folder or Path("runs") / {"full": "quantised", "smoke": "quantised_smoke"}[options.preset]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every chosen cell that is not there yet, and print all."""
    began, options = time.perf_counter(), options_of(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    settings, cells = asdict(PRESETS[options.preset]), options.folder / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(cells / "settings.json", settings)
    rows: list[dict] = []
    missing: list[dict] = []
    skipped: list[str] = []
    chosen = [what for what in QUANTISATIONS if what.name in options.quantisations]

    def result() -> dict:
        complete = not missing and not skipped
        return make_result("quantised", settings, rows, [], missing=missing, skipped=skipped, complete=complete)

    for subject in subjects_of(options.models, PRESETS[options.preset], options.folder):
        for what in chosen:
            name = f"{subject.name}-{what.name}"
            done = (cells / f"{name}.json").exists()
            if not done and time.perf_counter() - began > options.seconds:
                skipped.append(name)
                continue
            try:
                rows.append(measured(cells, name, lambda subject=subject, what=what: subject.measure(what)))
            except NotAvailable as error:
                missing.append({"model": subject.name, "title": what.title, "why": str(error)})
                continue
            print(f"{name}: {rows[-1]['seconds']:.1f} s{', in an earlier run' * done}", flush=True)
            if options.json is not None:  # a run that is cut short keeps what it has
                write_result(result(), options.json)
    print("\n" + report(result()))
    hand_over(result(), None if options.json is None else str(options.json))


if __name__ == "__main__":
    run_script(main)
