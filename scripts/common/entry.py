"""What entry points share: errors in one line, and the option that shows this project's own requirements."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from specdec.cli.command import status_of


def run_script(main: Callable[[], object]) -> NoReturn:
    """Run `main`, whatever it returns, and exit: with status 2 after one line for bad input."""

    def run() -> None:
        main()

    sys.exit(status_of(run))


def add_bars_option(parser: argparse.ArgumentParser) -> None:
    """--bars."""
    text = "also say which of this project's own requirements the figures meet (they are in the JSON in any case)"
    parser.add_argument("--bars", action="store_true", help=text)


def one_line(error: Exception) -> str:
    """An error's type and the beginning of what it says, for result files."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
