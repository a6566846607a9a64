"""`specdec info`: what is installed, and what becomes of a model here."""

import argparse
import json
import sys

from specdec.cli.command import Command, new_parser, one_line
from specdec.info import conflicts, environment, explain_model


def parser(prog: str = "specdec info") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, "Versions, device, and packages of the same names that shadow ours, as JSON.")
    model = "a model's folder or hub id: which of its operations are fused, which are not, and why"
    options.add_argument("--model", metavar="DIR", help=model)
    return options


def run(options: argparse.Namespace) -> int:
    """Print the environment and all conflicts, and with --model what is fused in it.

    Returns 1 if there is a conflict or the model cannot be run, else 0."""
    trouble = conflicts()
    print(json.dumps(environment() | {"conflicts": trouble}, indent=1))
    if options.model is not None:
        try:
            print(explain_model(options.model))
        except (ValueError, OSError, ImportError) as error:
            print(f"{options.model}: {one_line(error)}", file=sys.stderr)
            return 1
    return 1 if trouble else 0


COMMAND = Command(parser, run)
