"""`specdec convert`: chats of any known layout as a jsonl of messages."""

import argparse
from pathlib import Path

from specdec.cli.command import Command, new_parser
from specdec.training.files import write_chats

ABOUT = """Turn a file of chats, ShareGPT's or others that training reads, into a jsonl of {"messages": …}.

Training reads such files as they are; this is for looking at them, or for other tools. Rows without an answer to a user
are left out and counted."""


def parser(prog: str = "specdec convert", about: str = ABOUT) -> argparse.ArgumentParser:
    """The options."""
    options = new_parser(prog, about)
    options.add_argument("source", type=Path)
    options.add_argument("result", type=Path)
    return options


def run(options: argparse.Namespace) -> None:
    """Write the chats and say how many."""
    written, left_out = write_chats(options.source, options.result)
    print(f"{written} chats in {options.result}, {left_out} rows without an answer left out")


COMMAND = Command(parser, run)
