"""Command line: `python -m specdec demo` and `python -m specdec generate`."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; bad input prints one line and returns 2."""
    parser = argparse.ArgumentParser(prog="python -m specdec", description="Exact speculative decoding.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "run the shipped pair on held-out prompts, beside transformers"
    _add_demo(commands.add_parser("demo", help=about).add_argument)
    _add_generate(commands.add_parser("generate", help="generate with your own target and draft model").add_argument)
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            from specdec.cli.demo import run
        else:
            from specdec.cli.generate import run
        return run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_demo(add) -> None:
    add("--prompts", type=int, default=3, help="prompts of each kind (default 3, at most 8)")
    add("--max-new-tokens", type=int, default=64)
    length = "draft length γ, also for transformers' assisted generation"
    add("--num-tokens", type=int, default=3, help=length)
    threads = "threads for all methods; the shipped matrices are too small to gain from more"
    add("--threads", type=int, default=1, help=threads)
    add("--plot", default="specdec_demo.png", help="where the plot goes")
    add("--seed", type=int, default=0)
    drafter = "one more method of that name: FUNCTION gets the shipped pair and returns a drafter (may be given again)"
    add("--drafter", action="append", default=[], metavar="NAME=MODULE:FUNCTION", help=drafter)


def _add_generate(add) -> None:
    add("--target", required=True, help="folder or hub id")
    add("--draft", required=True, help="folder or hub id")
    add("--prompt", required=True)
    add("--num-tokens", type=int, default=5, help="draft length γ")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0, help="0 (default): greedy")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int)
    add("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    add("--device", help="default: cuda if there is one, else cpu")
    mode = "eager, graph (CUDA graphs), compile (torch.compile) or auto (default): graph on a GPU, eager on a CPU"
    add("--mode", default="auto", help=mode)
    add("--json", action="store_true", help="print one JSON object instead of text")


if __name__ == "__main__":
    sys.exit(main())
