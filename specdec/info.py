"""What is installed, whether other distributions' packages shadow ours, and what becomes of a model here."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

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


def commit(file: Path | None = None) -> str | None:
    """The commit of the checkout, with "+" where files differ from it; None outside one.

    file: one of the checkout (None: this one)."""
    file = Path(__file__) if file is None else file

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # else it is installed inside another checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
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
