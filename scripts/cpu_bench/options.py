"""The command line of `scripts.bench_cpu`, and what a result says about it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.cpu_bench.methods import KINDS, PEERS
from specdec.cli.command import new_parser, require_at_least_one
from specdec.model.modes import MODES

PAIR = "pair"
SHAPES = (PAIR, "wide", "toy")


def options_of(arguments: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """The command line, checked. Raises ValueError for options that do not fit together."""
    parser = new_parser("python -m scripts.bench_cpu", description)
    _add_methods(parser.add_argument)
    _add_work(parser.add_argument)
    _add_files(parser.add_argument)
    options = parser.parse_args(arguments)
    require_at_least_one(options, "threads", "batch", "prompts", "prompt_tokens", "new_tokens", "length", "repeats")
    plain_work = (options.shape, options.dtype, options.batch) == (PAIR, "float32", 1)
    if options.peers is None:
        options.peers = list(PEERS) if plain_work else []
    elif options.peers and not plain_work:
        raise ValueError("--peers decode the shipped pair in float32 at batch 1, so they go with no other --shape, "
                         "--dtype or --batch")  # fmt: skip
    unknown = sorted(set(options.peers) - set(PEERS))
    if unknown:
        raise ValueError(f"--peers must be of {', '.join(PEERS)}, got {', '.join(unknown)}")
    options.python = _interpreters(options.python)
    if options.base is not None and not (options.base / "specdec").is_dir():
        raise ValueError(f"--base {options.base} is no checkout of this repository")
    return options


def _add_methods(add) -> None:
    peers = "separated by commas (default: all, for the shipped pair in float32 at batch 1)"
    add("--peers", type=lambda text: [name for name in text.split(",") if name], metavar=",".join(PEERS), help=peers)
    python = "the interpreter that has this peer installed (may be given again; default: this one)"
    add("--python", action="append", default=[], metavar="PEER=PATH", help=python)
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of decoding")
    add("--modes", nargs="+", choices=MODES, default=[], help="also our chain in these modes of a runner")
    add("--base", type=Path, metavar="DIR", help="also another checkout of this repository, as ours")


def _add_work(add) -> None:
    add("--shape", choices=SHAPES, default=PAIR, help="the shipped pair, or random weights of a shape")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--threads", type=int, default=1, help="of every method")
    add("--batch", type=int, default=1, help="prompts a call; above 1 ours and --base only")
    add("--prompts", type=int, default=2, help="of each of four kinds; of a shape so many batches of random tokens")
    add("--prompt-tokens", type=int, default=64, help="of a shape's prompts")
    add("--new-tokens", type=int, default=128, help="of each text")
    add("--length", type=int, default=5, help="γ, drafted tokens a round")
    add("--draft-layers", type=int, default=2, help="layers of a shape that contribute, which are its draft")
    add("--repeats", type=int, default=5, help="passes over all prompts")
    samples = "texts of each method, drawn at temperature 1, that are tested for whose they are (0: none)"
    add("--samples", type=int, default=64, help=samples)
    add("--seed", type=int, default=0)


def _add_files(add) -> None:
    exports = "where models in the peers' formats are kept for later runs (default: nowhere)"
    add("--exports", type=Path, metavar="DIR", help=exports)
    add("--limit", type=float, default=600.0, help="seconds that an export, a start or a call may take")
    add("--plot", metavar="FILE", help="where the plot goes (default: none is drawn)")
    add("--json", metavar="FILE", help="where the figures go (default: to standard output if that is no terminal)")
    add("--from", dest="source", metavar="FILE", help="print and draw an earlier --json FILE; nothing is measured")


def _interpreters(given: Sequence[str]) -> dict[str, str]:
    """Peers and the interpreters that they run in.

    >>> _interpreters(["openvino=/opt/ov/bin/python"])
    {'openvino': '/opt/ov/bin/python'}
    """
    found = {}
    for text in given:
        peer, _, path = text.partition("=")
        if peer not in PEERS or not path:
            raise ValueError(f"--python is PEER=PATH with a peer of {', '.join(PEERS)}, got {text!r}")
        found[peer] = path
    return found


def note_of(settings: dict) -> str:
    """What was measured, and what about it is synthetic."""
    if settings["shape"] == PAIR:
        what = "The shipped pair"
    else:
        layers = settings["draft_layers"]
        what = (
            f"Synthetic control: random weights in the shape {settings['shape']!r}; layers from {layers} on contribute "
            f"zero, so that the first {layers} are an exactly right draft"
        )
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    return (
        f"{what}. {settings['dtype']}, batch {settings['batch']}, {threads}, γ {settings['length']}, "
        f"{settings['new_tokens']} new tokens a text, greedy, ends of text ignored; whole calls, prompt included."
    )
