"""What is installed, and whether another distribution's packages of the same names lie in the way: `python -m
specdec.info`. With `--model DIR`, whether and how fast a model can be run: which of its operations are fused, which are
not, and why."""

import argparse
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
    """Sentences about packages that are not ours though they carry our names; plain `attention`, `medusa` and `specdec`
    exist on PyPI.
    """
    found = foreign_packages()
    for name, owners in metadata.packages_distributions().items():
        others = sorted(set(owners) - {DISTRIBUTION})
        if name in PACKAGES and others:
            found.append(
                f"the distribution {', '.join(others)} also installs `{name}`: uninstall it, then reinstall "
                f"{DISTRIBUTION}"
            )
    return found


def explain_model(name: str) -> str:
    """What a runner says of the model in a folder or on the hub; raises `attention.UnsupportedArchitecture` for one
    that cannot be run.
    """
    from specdec.loading import load_model
    from specdec.model.runner import ModelRunner

    runner = ModelRunner(load_model(name))
    limit = "no limit of positions is known" if runner.limit is None else f"up to {runner.limit}"
    return f"{runner.explain()}\n{limit}"


def main(arguments: list[str] | None = None) -> int:
    """Print the environment as JSON and every conflict; exit 1 if there is one. With --model, what becomes of that
    model; exit 1 if it cannot be run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m specdec.info", description="What is installed, and what becomes of a model here."
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a model's folder or hub id: which of its operations are fused, which are not, and why",
    )
    options = parser.parse_args(arguments)
    trouble = conflicts()
    print(json.dumps(environment() | {"conflicts": trouble}, indent=1))
    if options.model is not None:
        try:
            print(explain_model(options.model))
        except (ValueError, OSError) as error:
            print(f"{options.model}: {error}", file=sys.stderr)
            return 1
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
