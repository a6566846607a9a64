"""Train an EAGLE-3 drafter for a model of your own: the same as `specdec train --kind eagle3`.

python -m scripts.train_eagle3 --help
"""

import sys
from collections.abc import Sequence

from specdec.cli.train_eagle3 import COMMAND


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> its status."""
    return COMMAND(arguments, prog="python -m scripts.train_eagle3")


if __name__ == "__main__":
    sys.exit(main())
