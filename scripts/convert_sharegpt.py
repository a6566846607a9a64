"""Turn ShareGPT's json or jsonl into a jsonl of {"messages": [{"role", "content"}, …]}.

    python -m scripts.convert_sharegpt sharegpt.json chats.jsonl

`scripts.train_medusa` reads ShareGPT files as they are; this is for looking at them, or for other tools. Rows in which
no assistant answers a user are left out and counted."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from specdec.training.data import read_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args(arguments)
    rows = read_rows(options.source)
    chats = [
        row["messages"] for row in rows if any(message["role"] == "assistant" for message in row.get("messages", ()))
    ]
    options.result.write_text(
        "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in chats), encoding="utf-8"
    )
    print(f"{len(chats)} chats in {options.result}, {len(rows) - len(chats)} rows without an answer left out")


if __name__ == "__main__":
    main()
