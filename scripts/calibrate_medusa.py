"""Measure Medusa heads and choose their tree for this machine: the same as `specdec calibrate --kind medusa`.

python -m scripts.calibrate_medusa --help
"""

import sys

from medusa.cli.calibrate import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND(None, prog="python -m scripts.calibrate_medusa"))
