"""What is installed, and whether other distributions' packages shadow ours: `python -m specdec.info`.

With `--model DIR`, whether a model can be run, which of its operations are fused, which are not, and why."""

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
    """Sentences about foreign packages of our names; plain `attention`, `medusa` and `specdec` exist on PyPI."""
    found = foreign_packages()
    for name, owners in metadata.packages_distributions().items():
        others = sorted(set(owners) - {DISTRIBUTION})
        if name in PACKAGES and others:
            also = f"the distribution {', '.join(others)} also installs `{name}`"
            found.append(f"{also}: uninstall it, then reinstall {DISTRIBUTION}")
    return found


def explain_model(name: str) -> str:
    """`ModelRunner.explain` for the model in a folder or on the hub, and its largest length.

    Raises `attention.UnsupportedArchitecture` for one that cannot be run."""
    from specdec.loading import load_model
    from specdec.model.runner import ModelRunner

    runner = ModelRunner(load_model(name))
    limit = "no limit of positions is known" if runner.limit is None else f"up to {runner.limit}"
    return f"{runner.explain()}\n{limit}"


def main(arguments: list[str] | None = None) -> int:
    """Print the environment and all conflicts as JSON, and with --model what is fused in it.

    Returns 1 if there is a conflict or the model cannot be run, else 0."""
    about = "What is installed, and what becomes of a model here."
    parser = argparse.ArgumentParser(prog="python -m specdec.info", description=about)
    model = "a model's folder or hub id: which of its operations are fused, which are not, and why"
    parser.add_argument("--model", metavar="DIR", help=model)
    options = parser.parse_args(arguments)
    trouble = conflicts()
    print(json.dumps(environment() | {"conflicts": trouble}, indent=1))
    if options.model is not None:
        try:
            print(explain_model(options.model))
        except (ValueError, OSError, ImportError) as error:
            print(f"{options.model}: {error}", file=sys.stderr)
            return 1
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
