"""`specdec info`: what is installed, and what becomes of a model here."""

import argparse
import json
import sys

from specdec.cli.command import Command, new_parser, one_line
from specdec.cli.kinds import make_drafter
from specdec.drafters.loading import Described
from specdec.info import conflicts, environment, explain_model
from specdec.loading import load_model
from specdec.model.runner import ModelRunner


def parser(prog: str = "specdec info") -> argparse.ArgumentParser:
    """The options and their defaults."""
    options = new_parser(prog, "Versions, device, and packages of the same names that shadow ours, as JSON.")
    model = "a model's folder or hub id: which of its operations are fused, which are not, and why"
    options.add_argument("--model", metavar="DIR", help=model)
    drafter = "a drafter for that model, as for `specdec generate`: what its file says, and what its format decides"
    options.add_argument("--drafter", metavar="DRAFTER", help=drafter)
    return options


def run(options: argparse.Namespace) -> int:
    """Print the environment and all conflicts, with --model what is fused in it, with --drafter what that is.

    Returns 1 if there is a conflict, or the model or the drafter cannot be run, else 0."""
    if options.drafter is not None and options.model is None:
        raise ValueError(f"--drafter {options.drafter} needs --model, the target that it drafts for")
    trouble = conflicts()
    print(json.dumps(environment() | {"conflicts": trouble}, indent=1))
    if options.model is not None:
        try:
            print(explain_model(options.model))
        except (ValueError, OSError, ImportError) as error:
            print(f"{options.model}: {one_line(error)}", file=sys.stderr)
            return 1
    if options.drafter is not None:
        try:
            print(describe_drafter(options.model, options.drafter))
        except (ValueError, OSError, ImportError) as error:
            print(f"{options.drafter}: {one_line(error)}", file=sys.stderr)
            return 1
    return 1 if trouble else 0


def describe_drafter(model: str, spec: str) -> str:
    """What the file of a drafter for `model` says, and its largest draft. Raises ValueError unless it fits."""
    target = ModelRunner(load_model(model), mode="eager")
    drafter = make_drafter(spec, target)
    drafter.validate(target)
    told = drafter.describe() if isinstance(drafter, Described) else type(drafter).__name__
    return f"{told}\ndrafts up to {drafter.traits.max_tokens} tokens a round"


COMMAND = Command(parser, run)
