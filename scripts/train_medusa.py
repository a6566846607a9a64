"""Train Medusa heads for a model of your own: the same as `specdec train --kind medusa`.

python -m scripts.train_medusa --help
"""

import sys
from collections.abc import Sequence

from medusa.cli.train import COMMAND


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> its status."""
    return COMMAND(arguments, prog="python -m scripts.train_medusa")


if __name__ == "__main__":
    sys.exit(main())
