"""Checks that no other distribution's package is imported under the name of one of our three packages."""

from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "specdec-lab"
PACKAGES = ("attention", "medusa", "specdec")


def foreign_packages() -> list[str]:
    """One sentence for each of our package names under which Python finds another one; imports nothing."""
    home, found = Path(__file__).resolve().parents[1], []
    for name in PACKAGES:
        spec = find_spec(name)
        where = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if where != home / name:
            found.append(f"`import {name}` finds {where}, not the package of {DISTRIBUTION} in {home}")
    return found


def refuse_foreign_packages() -> None:
    """Raise ImportError if `import attention` would find another distribution's package."""
    trouble = [sentence for sentence in foreign_packages() if sentence.startswith("`import attention`")]
    if trouble:
        raise ImportError(
            f"{trouble[0]}. Remove the other from the path, or uninstall its distribution and reinstall {DISTRIBUTION}."
        )
