"""Train Medusa heads for a model of your own: the same as `specdec train --kind medusa`.

python -m scripts.train_medusa --help
"""

import sys

from medusa.cli.train import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND(None, prog="python -m scripts.train_medusa"))
