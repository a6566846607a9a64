"""`specdec convert`: chats of any known layout as a jsonl of messages."""

import argparse
from pathlib import Path

from specdec.cli.command import Command, new_parser
from specdec.training.files import write_chats
from specdec.training.report import RowReport

ABOUT = """Turn a file of chats, ShareGPT's or others that training reads, into a jsonl of {"messages": …}.

Training reads such files as they are; this is for looking at them, or for other tools. Rows that are no chats, or in
which no assistant answers, are left out and counted by reason; with --strict the first of them is an error."""


def parser(prog: str = "specdec convert", about: str = ABOUT) -> argparse.ArgumentParser:
    """The options."""
    options = new_parser(prog, about)
    options.add_argument("source", type=Path)
    options.add_argument("result", type=Path)
    options.add_argument("--strict", action="store_true", help="stop at the first row that would be left out")
    return options


def run(options: argparse.Namespace) -> None:
    """Write the chats and say how many."""
    report = RowReport(options.strict)
    written, left_out = write_chats(options.source, options.result, report)
    if report.table():
        print(report.table())
    print(f"{written} chats in {options.result}, {left_out} rows left out")


COMMAND = Command(parser, run)
