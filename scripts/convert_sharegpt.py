"""Turn ShareGPT's json or jsonl into a jsonl of messages. The same as `specdec convert`.

python -m scripts.convert_sharegpt sharegpt.json chats.jsonl
"""

import sys

from specdec.cli.convert import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND(None, prog="python -m scripts.convert_sharegpt"))
