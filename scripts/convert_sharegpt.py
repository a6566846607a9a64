"""Turn ShareGPT's json or jsonl into a jsonl of messages. The same as `specdec convert`.

python -m scripts.convert_sharegpt sharegpt.json chats.jsonl
"""

import sys
from collections.abc import Sequence

from specdec.cli.convert import COMMAND


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> its status."""
    return COMMAND(arguments, prog="python -m scripts.convert_sharegpt")


if __name__ == "__main__":
    sys.exit(main())
