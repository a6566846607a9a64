"""Measure Medusa heads and choose their tree for this machine: the same as `specdec calibrate --kind medusa`.

python -m scripts.calibrate_medusa --help
"""

import sys
from collections.abc import Sequence

from medusa.cli.calibrate import COMMAND


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> its status."""
    return COMMAND(arguments, prog="python -m scripts.calibrate_medusa")


if __name__ == "__main__":
    sys.exit(main())
