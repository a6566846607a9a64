"""Turn ShareGPT's json or jsonl into a jsonl of {"messages": [{"role", "content"}, …]}.

    python -m scripts.convert_sharegpt sharegpt.json chats.jsonl

`scripts.train_medusa` reads ShareGPT files as they are; this is for looking at them, or for other tools. Rows in which
no assistant answers a user are left out and counted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from specdec.training.files import write_chats


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args(arguments)
    written, left_out = write_chats(options.source, options.result)
    print(f"{written} chats in {options.result}, {left_out} rows without an answer left out")


if __name__ == "__main__":
    main()
