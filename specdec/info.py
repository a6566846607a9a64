"""What is installed, and whether another distribution's packages of the same names lie in the way: `python -m specdec.info`."""

import json
import platform
import sys
from importlib import metadata

import torch
import transformers

from specdec._guard import DISTRIBUTION, PACKAGES, foreign_packages


def environment() -> dict:
    """Versions and device, for every result file."""
    cuda = torch.cuda.is_available()
    return {
        "specdec": _version(DISTRIBUTION),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def conflicts() -> list[str]:
    """Sentences about packages that are not ours though they carry our names; plain `attention`, `medusa` and `specdec` exist on PyPI."""
    found = foreign_packages()
    for name, owners in metadata.packages_distributions().items():
        others = sorted(set(owners) - {DISTRIBUTION})
        if name in PACKAGES and others:
            found.append(f"the distribution {', '.join(others)} also installs `{name}`: uninstall it, then reinstall {DISTRIBUTION}")
    return found


def main() -> int:
    """Print the environment as JSON and every conflict; exit 1 if there is one."""
    trouble = conflicts()
    print(json.dumps(environment() | {"conflicts": trouble}, indent=1))
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
