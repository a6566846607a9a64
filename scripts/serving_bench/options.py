"""The command line of `scripts.bench_serving`, its presets, and what a result says about them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.common.entry import add_bars_option
from scripts.generate_bench.models import SHAPES, TINY, WEIGHTS
from scripts.serving_bench.experiments import EXPERIMENTS, IDLE, INT8, PREFIX, REQUESTS, SWEEP
from scripts.serving_bench.methods import (
    DRAFT,
    HEADS,
    LOOKUP,
    PARTIAL,
    PEER,
    PLAIN,
    TITLES,
    TOTAL,
    check_method,
    engine_options,
)

# fmt: off
COMMON = dict(
    shape="llama-3.1-8b", model=None, draft=None, weights="counting", draft_layers=2, length=5, prompt=(32, 2048),
    output=(32, 512), prefix=2048, prefix_requests=64, idle_rows=64, least_requests=16, rates=(), clients=(8,),
    batches=(1, 8, 32, 128, 256), ttft_limit=1.0, itl_limit=0.05, repeats=3, warm_passes=1, method_seconds=60.0,
    tokens_per_step=2048,
)
PRESETS: dict[str, dict] = {
    "8b": COMMON | dict(
        requests=256, rows=256, experiments=(REQUESTS, SWEEP, PREFIX, INT8, IDLE), rates=(2.0, 8.0, 16.0),
        methods=(PEER, "static-64", PLAIN, TOTAL, PARTIAL),
    ),
    "shipped": COMMON | dict(
        shape=None, model=TINY, length=3, prompt=(32, 512), output=(16, 256), requests=32, rows=32, prefix=512,
        prefix_requests=16, batches=(1, 4, 16, 32), least_requests=8, rates=(2.0, 4.0, 8.0, 16.0),
        repeats=5, method_seconds=12.0, experiments=(REQUESTS, PREFIX, INT8),
        methods=(PEER, "static-8", PLAIN, DRAFT, HEADS, LOOKUP), warm_passes=2,
    ),
    "smoke": COMMON | dict(
        shape="toy", weights="random", prompt=(4, 24), output=(2, 12), requests=6, rows=4, prefix=256,
        prefix_requests=4, batches=(1, 2), least_requests=4, rates=(200.0,), clients=(2,), length=2, repeats=1,
        warm_passes=0, experiments=EXPERIMENTS,
        methods=(PEER, "static-2", PLAIN, TOTAL, PARTIAL, LOOKUP), tokens_per_step=64,
    ),
}
# fmt: on
PARENT = ("json", "seconds", "folder", "plots", "bars", "experiments")  # options that change no measurement


def options_of(arguments: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """The command line, checked, with the preset's values for what it leaves out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_models(parser.add_argument)
    _add_workload(parser.add_argument)
    _add_run(parser.add_argument)
    add_bars_option(parser)
    options = parser.parse_args(arguments)
    given = {name for name, value in vars(options).items() if value is not None}
    for name, value in PRESETS[options.preset].items():
        if name not in given and not (name == "model" and "shape" in given):
            setattr(options, name, list(value) if isinstance(value, tuple) else value)
    cpu = options.preset != "8b" or not torch.cuda.is_available()
    options.device = options.device or ("cpu" if cpu else "cuda")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.trace is not None and "rates" not in given:
        options.rates = []  # its own arrivals
    problem = _problem_of(options)
    if problem:
        parser.error(problem)
    return options


def _problem_of(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, or None."""
    least = ("requests", "rows", "repeats", "length", "tokens_per_step", "prefix", "prefix_requests", "idle_rows")
    small = [name for name in least if getattr(options, name) < 1]
    if small or min(*options.batches, *options.clients, *options.prompt, *options.output) < 1:
        return "counts and lengths must be at least 1"
    if options.warm_requests is not None and options.warm_requests < 1:
        return f"--warm-requests must be at least 1, got {options.warm_requests}"
    if options.prompt[0] > options.prompt[1] or options.output[0] > options.output[1]:
        return "--prompt and --output take the smaller length first"
    if any(rate <= 0 for rate in options.rates) or min(options.ttft_limit, options.itl_limit) <= 0:
        return "--rates and limits must be above 0"
    try:
        options.methods = [check_method(method) for method in options.methods]
        engine_options([*options.engine, *options.drafted])
    except ValueError as error:
        return str(error)
    return None


def _add_models(add) -> None:
    add("--preset", choices=PRESETS, default="shipped", help="values of all options that are left out")
    add("--shape", choices=SHAPES, help="random weights of this shape, with its first layers as an exact draft")
    add("--weights", choices=WEIGHTS, help='of a shape; "counting" leaves no near-ties in 16 bits')
    add("--draft-layers", type=int, help="layers of a shape that contribute, which are its draft")
    add("--model", metavar="DIR_OR_HUB_ID", help=f'a model instead of a shape; "{TINY}" is the shipped pair')
    add("--draft", metavar="DIR_OR_HUB_ID", help="its draft model")
    add("--length", type=int, help="γ, drafted tokens a round")
    add("--device", choices=["cpu", "cuda"], help="default: cuda for 8b where there is one")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--mode", default="auto", help="of `ModelRunner` (default: auto)")
    add("--engine", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of `specdec.Engine`")
    add("--drafted", nargs="+", default=[], metavar="NAME=VALUE", help="the same, of engines with drafts alone")
    add("--tokens-per-step", type=int, help="of an engine's step, prompts and rounds together")
    add("--memory", type=int, metavar="BYTES", help="of an engine's caches (default: what its requests need)")


def _add_workload(add) -> None:
    trace = 'JSON lines: "prompt" (text or ids) or "prompt_tokens", "output_tokens", "arrival" in seconds or none'
    add("--trace", type=Path, metavar="FILE", help=trace)
    add("--requests", type=int, help="requests of a run")
    add("--prompt", type=int, nargs=2, metavar=("LOW", "HIGH"), help="tokens of prompts, log-uniform; texts are cut")
    add("--output", type=int, nargs=2, metavar=("LOW", "HIGH"), help="new tokens, log-uniform")
    add("--rows", type=int, help="requests that run at the same time")
    add("--rates", type=float, nargs="+", help="requests a second of the Poisson arrivals")
    add("--clients", type=int, nargs="+", help="clients with one request in flight each")
    add("--batches", type=int, nargs="+", help="requests at the same time in the sweep")
    add("--least-requests", type=int, help="of the sweep, which has 4 for each row")
    add("--prefix", type=int, help="tokens that requests share")
    add("--prefix-requests", type=int, help="requests that share them")
    add("--idle-rows", type=int, help="requests that decode while the GPU's idle time is taken")
    add("--ttft-limit", type=float, metavar="SECONDS", help="time to first token that goodput asks for")
    add("--itl-limit", type=float, metavar="SECONDS", help="time per output token that goodput asks for")
    add("--seed", type=int, default=0, help="of weights, lengths, prompts and arrivals")


def _add_run(add) -> None:
    add("--experiments", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    add("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(TITLES)}, static-N")
    add("--repeats", type=int, help="passes of each method that count")
    add("--warm-passes", type=int, help="passes of ours before, in which graphs are captured")
    add("--warm-requests", type=int, metavar="N", help="the first N requests alone in these passes (default: all)")
    add("--method-seconds", type=float, help="no further pass of a method whose passes took so long")
    add("--seconds", type=float, default=float("inf"), help="begin no further cell after so many seconds of this run")
    keep = "keep what each cell gave here, and take it from here instead of measuring it again"
    add("--folder", type=Path, metavar="DIR", help=keep)
    add("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add("--plots", type=Path, metavar="DIR", help="draw what was measured into DIR")


def settings_of(options: argparse.Namespace) -> dict:
    """What a measurement depends on, ready for JSON."""
    chosen = {name: value for name, value in vars(options).items() if name not in PARENT}
    return json.loads(json.dumps(chosen, default=str))
