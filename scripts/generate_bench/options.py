"""The command line of `scripts.bench_generate`, and what a result says about it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.common.entry import add_bars_option
from scripts.generate_bench.methods import COSTS, LONG_RUN, METHODS, ROOFLINE
from scripts.generate_bench.models import SHAPES, TINY, WEIGHTS, build_shape
from scripts.generate_bench.peers import ASSISTED, EAGER, LOOKUP, STATIC
from scripts.generate_bench.quantised import CHOICES, NONE, kinds_of, refusal, require_layers

AUDIT = "audit"
# fmt: off
FIRST = (  # what matters most comes first
    ROOFLINE, EAGER, STATIC, "autoregressive-graph", "chain-graph", ASSISTED, f"{COSTS}-graph", "autoregressive-eager",
    "medusa-graph", "tree-graph", "autoregressive-compile", "chain-compile", "medusa-compile", "tree-compile",
    "lookup-graph", LOOKUP, "chain-eager", "medusa-eager", "tree-eager", "lookup-eager", f"{COSTS}-eager",
    "lookup-compile", f"{COSTS}-compile",
)
# options that change no measurement
PARENT = ("methods", "method", "records", "json", "seconds", "method_seconds", "compared", "bars")
# fmt: on


def options_of(arguments: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_models(parser.add_argument)
    _add_sizes(parser.add_argument)
    _add_run(parser.add_argument)
    add_bars_option(parser)
    options = parser.parse_args(arguments)
    if options.acceptance is not None and (options.model is not None or not 0 <= options.acceptance <= 1):
        parser.error("--acceptance lies in [0, 1] and goes with a --shape, whose draft is exact")
    if min(*options.batch, options.length, options.repeats) < 1 or options.new_tokens < 4 or options.prompt < 2:
        parser.error(
            "batch sizes, --length and --repeats must be at least 1, --prompt at least 2, --new-tokens at least 4"
        )
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    _check_quants(parser, options)
    options.methods = options.methods or [*FIRST, *([f"{LONG_RUN}-graph"] if options.long_run else [])]
    return options


def _check_quants(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse kinds of weights that cannot work, before a process is started for them."""
    try:
        if problem := refusal(options, options.model in (None, TINY) or options.draft is not None):
            parser.error(problem)
    except ImportError as error:
        parser.error(str(error))
    if options.model is None and set(kinds_of(vars(options))) != {NONE}:
        models = build_shape(options.shape, options.draft_layers, "random", torch.bfloat16, "meta", options.seed)
        for what, kind in zip(("target", "draft"), kinds_of(vars(options)), strict=True):
            require_layers(getattr(models, what), kind, what)


def _add_models(add) -> None:
    shape = "random weights of this shape (default: %(default)s)"
    add("--shape", choices=SHAPES, default="llama-3.1-8b", help=shape)
    add("--weights", choices=WEIGHTS, default="random", help="of a shape (default: %(default)s)")
    layers = "layers of a shape that contribute, which are its draft (default: %(default)s)"
    add("--draft-layers", type=int, default=2, help=layers)
    planted = "plant wrong tokens in our chains, so that each drafted token is right that often"
    add("--acceptance", type=float, metavar="A", help=planted)
    add("--model", metavar="DIR_OR_HUB_ID", help='a model instead of a shape; "tiny" is the shipped pair')
    add("--draft", metavar="DIR_OR_HUB_ID", help="its draft model")
    host = "layers of the target whose weights are streamed from host memory; modes other than eager have none"
    add("--host-layers", type=int, default=0, metavar="N", help=host)
    for what in ("target", "draft"):
        text = f"quantise the weights of the {what} through torchao, the extra quant (default: %(default)s)"
        add(f"--{what}-quant", choices=CHOICES, default=NONE, help=text)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    dtype = "default: bfloat16 on a GPU, float32 on a CPU"
    add("--dtype", choices=["bfloat16", "float16", "float32"], help=dtype)


def _add_sizes(add) -> None:
    texts = 'texts, a line each, plain or {"text": …} (default: those of the shipped pair)'
    add("--prompts", type=Path, metavar="FILE", help=texts)
    add("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="batch sizes (default: 1 8 32)")
    for name, value, what in (
        ("prompt", 128, "prompt tokens, at most for texts"),
        ("new-tokens", 256, "new tokens a text"),
        ("length", 5, "γ, drafted tokens a round"),
        ("repeats", 5, "calls that count"),
        ("long-run", 0, "rounds of the long run; 0: none"),
        ("seed", 0, "of weights and prompts"),
    ):
        add(f"--{name}", type=int, default=value, help=f"{what} (default: %(default)s)")


def _add_run(add) -> None:
    methods = f"of {', '.join(METHODS)} (default: all that generate or cost)"
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=methods)
    row = "of the calls that count; two are always made (default: %(default)s)"
    add("--row-seconds", type=float, default=20.0, help=row)
    add("--method-seconds", type=float, default=300.0, help="of one process (default: %(default)s)")
    seconds = "begin no further process after so many seconds of this run"
    add("--seconds", type=float, default=float("inf"), help=seconds)
    records = "keep what a process measured here, and take it from here instead of measuring it again"
    add("--records", type=Path, metavar="DIR", help=records)
    add("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add("--method", choices=(*METHODS, AUDIT), help=argparse.SUPPRESS)  # this process measures one method
    add("--compared", type=Path, help=argparse.SUPPRESS)


def settings_of(options: argparse.Namespace) -> dict:
    """What a measurement depends on, ready for JSON."""
    chosen = {name: value for name, value in vars(options).items() if name not in PARENT}
    return json.loads(json.dumps(chosen, default=str))


def note_of(options: argparse.Namespace) -> str:
    """What was measured, and what about it is synthetic."""
    quants = kinds_of(vars(options))
    different = quants[0] != quants[1]
    if options.model is None:
        counting = " that count" if options.weights == "counting" else ""
        planted = f", into which our chains plant wrong tokens (acceptance {options.acceptance or 0:g})"
        what = (
            f"Synthetic control: random weights{counting} in the shape {options.shape}; layers from "
            f"{options.draft_layers} on contribute zero, so that the first {options.draft_layers} are an exactly right "
            f"draft{' before they are quantised' * different}{'' if options.acceptance is None else planted}"
        )
    else:
        draft = options.draft or ("the shipped one" if options.model == TINY else "none")
        what = f"Model {options.model}, draft {draft}"
    if options.host_layers:
        what += f"; {options.host_layers} layers of the target are streamed from host memory"
    weights = "" if quants == (NONE, NONE) else f" Weights: target {quants[0]}, draft {quants[1]}."
    return (
        f"{what}.{weights} {options.dtype} on {options.device}, γ {options.length}, {options.new_tokens} new tokens "
        "a text, greedy. Medusa heads are untrained."
    )
