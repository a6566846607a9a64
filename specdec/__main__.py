"""The command line, `specdec` or `python -m specdec`: a table of commands, each in a file of `specdec/cli/`."""

import sys
from collections.abc import Sequence
from importlib import import_module

import specdec

COMMANDS = {
    "demo": "run the shipped pair on held-out prompts, beside transformers",
    "generate": "a text from your target, with any drafter",
    "bench": "is drafting worth it for your pair? plain, assisted and ours, a table and a plot",
    "evaluate": "methods x models x tasks x temperatures x batch sizes, from one YAML file",
    "doctor": "what to expect of a drafter here, and why, before anything is run from end to end",
    "report": "tables and figures of results, as Markdown, LaTeX and pictures",
    "audit": "does a drafter leave your target's text as it is? greedy and sampled, with a verdict",
    "train": "train a drafter for your model",
    "calibrate": "measure a trained drafter, and choose its tree for this machine",
    "convert": "chats of any known layout as a jsonl of messages",
    "info": "what is installed, and what becomes of a model here",
}
USAGE = "\n".join([
    "usage: specdec COMMAND [options]     specdec COMMAND --help     specdec --version", "",
    "Exact speculative decoding for transformers models.", "",
    *(f"  {name:10} {about}" for name, about in COMMANDS.items()),
])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> its status: 2 for bad input, which prints one line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    if given == ["--version"]:
        print(f"specdec {specdec.__version__}")
        return 0
    if not given or given[0] not in COMMANDS:
        said = f"there is no command {given[0]!r}" if given else "a command is needed"
        print(f"error: {said}; there are {', '.join(COMMANDS)} (specdec --help)", file=sys.stderr)
        return 2
    name, rest = given[0], given[1:]
    if name not in ("train", "calibrate"):
        return import_module(f"specdec.cli.{name}").COMMAND(rest)
    return import_module("specdec.cli.train").run_kind(name, rest)


if __name__ == "__main__":
    sys.exit(main())
