"""Command line: `python -m specdec demo` and `python -m specdec generate`."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; bad input prints one line and returns 2."""
    parser = argparse.ArgumentParser(prog="python -m specdec", description="Exact speculative decoding.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run the shipped pair on held-out prompts, beside transformers")
    demo.add_argument("--prompts", type=int, default=3, help="prompts of each kind (default 3, at most 8)")
    demo.add_argument("--max-new-tokens", type=int, default=64)
    demo.add_argument(
        "--num-tokens", type=int, default=3, help="draft length γ, also for transformers' assisted generation"
    )
    demo.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads for all methods; the shipped matrices are too small to gain from more",
    )
    demo.add_argument("--plot", default="specdec_demo.png", help="where the plot goes")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--drafter",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="one more method of that name: FUNCTION gets the shipped pair and returns a drafter (may be given again)",
    )
    generate = commands.add_parser("generate", help="generate with your own target and draft model")
    generate.add_argument("--target", required=True, help="folder or hub id")
    generate.add_argument("--draft", required=True, help="folder or hub id")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--num-tokens", type=int, default=5, help="draft length γ")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16 or float16")
    generate.add_argument("--device", help="default: cuda if there is one, else cpu")
    generate.add_argument(
        "--mode",
        default="auto",
        help="eager, graph (CUDA graphs), compile (torch.compile) or auto (default): graph on a GPU, eager on a CPU",
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
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


if __name__ == "__main__":
    sys.exit(main())
