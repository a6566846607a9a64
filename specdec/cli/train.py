"""`specdec train` and `specdec calibrate`: the commands of a kind of drafter that can be trained."""

import argparse
from collections.abc import Sequence

from specdec.cli.command import Command, status_of
from specdec.cli.kinds import trainer_kinds


def run_kind(what: str, arguments: Sequence[str]) -> int:
    """Run `what`, "train" or "calibrate", of the kind that --kind names; if only one kind has it, of that."""
    first = argparse.ArgumentParser(prog=f"specdec {what}", add_help=False, allow_abbrev=False)
    first.add_argument("--kind")
    options, rest = first.parse_known_args(list(arguments))

    def run() -> int:
        name, command = find(what, options.kind)
        return command(rest, prog=f"specdec {what} --kind {name}")

    return status_of(run)


def find(what: str, name: str | None) -> tuple[str, Command]:
    """The kind and its command. Raises ValueError for a kind that is not installed or has no such command."""
    kinds = {kind: getattr(found, what) for kind, found in trainer_kinds().items() if getattr(found, what) is not None}
    if not kinds:
        raise ValueError(f"no installed package has drafters to {what}; in a checkout: pip install -e .")
    if name is None and len(kinds) == 1:
        (name,) = kinds
    if name not in kinds:
        raise ValueError(f"--kind must be one of {', '.join(kinds)}, got {name}")
    return name, kinds[name]
