"""Benchmark the attention core against the peers that are installed; a result is checked before its time is shown.

    python -m scripts.bench_attention                                   # everything, about five minutes on one H200
    python -m scripts.bench_attention --case tree --case decode --quick # some rows of some cases
    python -m scripts.bench_attention --json scripts/results/attention_h200.json

Times are medians of CUDA-graph replays, ten calls a graph, over memory that the level-2 cache does not hold (see
scripts/common/gpu_timing.py). Limits are what the same card reaches in a copy, a reduction and a matrix product. Each
error is against dense float64 arithmetic on sampled rows; a wrong result shows its error and no time. Ours runs at the
library's default page, peers at their best of 16, 64, 128, 256. Without a CUDA device the toy sizes run, in float32:
that checks the benchmark's path, and its times mean nothing."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from attention.kv.cache import DEFAULT_PAGE_SIZE
from scripts.attention_bench import rows as attention_rows
from scripts.attention_bench import rows_dense as attention_rows_dense
from scripts.attention_bench import rows_write as attention_rows_write
from scripts.attention_bench.bench import Bench
from scripts.attention_bench.peers import find_peers
from scripts.bench_table import header, kernel_lines, row_line, summary
from scripts.common.gpu_timing import CALLS, ceilings, time_graph, time_on_cpu
from scripts.common.result_files import one_line
from specdec.info import commit
from specdec.training.checkpoint import write_json

SCHEMA = 1
CASES = {
    "prefill": attention_rows_dense.prefill_rows,
    "write": attention_rows_write.write_rows,
    "decode": attention_rows.decode_rows,
    "verify": attention_rows.verify_rows,
    "tree": attention_rows.tree_rows,
    "shapes": attention_rows.shape_rows,
    "quant": attention_rows.quant_rows,
    "mixed": attention_rows_dense.mixed_rows,
}


def versions() -> dict[str, str | None]:
    """What the figures depend on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "flashinfer-python", "flash-attn-3", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "torch": torch.__version__}


def run_cases(bench: Bench, names: Sequence[str]) -> Iterator[dict]:
    """Every row of the named cases; a case that breaks gives a row that says so, and the others go on."""
    for name in names:
        try:
            yield from CASES[name](bench)
        except Exception as error:
            yield {
                "case": name,
                "label": "the rest of this case",
                "ours": {"name": "ours", "failed": one_line(error)},
                "peers": [],
                "bars": [],
            }
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def start_kernel_report() -> subprocess.Popen:
    """`scripts.kernel_resources` beside the measurements: it needs only a processor."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.kernel_resources", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environment,
    )


def finish_kernel_report(process: subprocess.Popen | None) -> dict:
    """What it found, or why there is nothing."""
    if process is None:
        return {"kernels": [], "not_read": {"all": "not asked for"}}
    out, _ = process.communicate()
    if process.returncode:
        return {"kernels": [], "not_read": {"all": f"scripts.kernel_resources ended with status {process.returncode}"}}
    return json.loads(out)


def save(results: dict, path: Path | None) -> None:
    """Write what there is so far: a run that is cut short keeps its rows."""
    if path is not None:
        write_json(results, path, allow_nan=False)


def benchmark(
    names: Sequence[str],
    size: str,
    device: torch.device,
    impl: str | None = None,
    kernels: bool = False,
    path: Path | None = None,
) -> dict:
    """Run and print the named cases; returns the whole result, which is also kept in `path` from row to row."""
    began = time.perf_counter()
    report = start_kernel_report() if kernels else None
    on_gpu = device.type == "cuda"
    limits = ceilings(device) if on_gpu else ceilings(device, megabytes=1, size=64)
    clock, calls, dtype = (time_graph, CALLS, torch.bfloat16) if on_gpu else (time_on_cpu, 1, torch.float32)
    bench = Bench(device, limits, find_peers(device), size, impl, clock, calls, dtype)
    results = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "versions": versions(),
        "git_sha": commit(),
        "settings": {
            "cases": list(names),
            "size": size,
            "impl": impl,
            "default_page": DEFAULT_PAGE_SIZE,
            "calls_per_graph": CALLS,
        },
        "ceilings": limits,
        "peers": {name: {"version": peer.version, "absent": peer.absent} for name, peer in bench.peers.items()},
        "records": [],
    }
    print("\n".join(header(results)), flush=True)
    for record in run_cases(bench, names):
        results["records"].append(record)
        print(row_line(record), flush=True)
        save(results, path)
    results["kernels"] = finish_kernel_report(report)
    results["wall_seconds"] = time.perf_counter() - began
    save(results, path)
    print(
        "\n".join(
            [
                "",
                *summary(results["records"]),
                *kernel_lines(results["kernels"]),
                f"{results['wall_seconds']:.0f} s in all",
            ]
        ),
        flush=True,
    )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="run this case only (may be given several times)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--quick", action="store_true", help="a few rows of each case, peers at pages of 64 only")
    parser.add_argument(
        "--kernels",
        action=argparse.BooleanOptionalAction,
        help="compile every shipped kernel configuration to read its registers, which "
        "takes about a minute of a processor (default: when all cases run in full)",
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = "toy" if device.type == "cpu" else "quick" if options.quick else "full"
    kernels = size == "full" and not options.case if options.kernels is None else options.kernels
    benchmark(options.case or list(CASES), size, device, kernels=kernels, path=options.json)


if __name__ == "__main__":
    main()
