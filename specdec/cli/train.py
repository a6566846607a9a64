"""`specdec train` and `specdec calibrate`: the commands of a kind of drafter that can be trained."""

import argparse
from collections.abc import Sequence

from specdec.cli.command import Command, status_of
from specdec.cli.kinds import trainer_kinds


def run_kind(what: str, arguments: Sequence[str]) -> int:
    """Run `what`, "train" or "calibrate", of the kind that --kind names; if only one kind has it, of that.

    Raises SystemExit after help."""
    first = argparse.ArgumentParser(prog=f"specdec {what}", add_help=False, allow_abbrev=False)
    first.add_argument("--kind")
    options, rest = first.parse_known_args(list(arguments))

    if options.kind is None and {"-h", "--help"} & {*rest} and len(kinds := kinds_with(what)) > 1:
        text = f"each kind has options of its own: specdec {what} --kind KIND --help"
        parser = argparse.ArgumentParser(prog=f"specdec {what}", description=text)
        parser.add_argument("--kind", choices=list(kinds), required=True, help="of the drafter (no default)")
        parser.parse_args(["--help"])

    def run() -> int:
        name, command = find(what, options.kind)
        return command(rest, prog=f"specdec {what} --kind {name}")

    return status_of(run)


def find(what: str, name: str | None) -> tuple[str, Command]:
    """The kind and its command. Raises ValueError for a kind that is not installed or has no such command."""
    kinds = kinds_with(what)
    if not kinds:
        raise ValueError(f"no installed package has drafters to {what}; in a checkout: pip install -e .")
    if name is None and len(kinds) == 1:
        (name,) = kinds
    if name not in kinds:
        raise ValueError(f"--kind must be one of {', '.join(kinds)}, got {name}")
    return name, kinds[name]


def kinds_with(what: str) -> dict[str, Command]:
    """The commands of that name, by kind."""
    return {kind: getattr(found, what) for kind, found in trainer_kinds().items() if getattr(found, what) is not None}
