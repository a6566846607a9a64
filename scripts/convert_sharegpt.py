"""Turn ShareGPT's json or jsonl into a jsonl of {"messages": [{"role", "content"}, …]}, with tools where it has any.

    python -m scripts.convert_sharegpt sharegpt.json chats.jsonl

`scripts.train_medusa` reads ShareGPT files as they are; this is for looking at them, or for other tools. Rows that are
no chats, or in which no assistant answers, are left out and counted; with --strict the first of them is an error.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from specdec.training.files import write_chats
from specdec.training.report import RowReport


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--strict", action="store_true", help="stop at the first row that would be left out")
    options = parser.parse_args(arguments)
    report = RowReport(options.strict)
    written, left_out = write_chats(options.source, options.result, report)
    if report.table():
        print(report.table())
    print(f"{written} chats in {options.result}, {left_out} rows left out")


if __name__ == "__main__":
    main()
