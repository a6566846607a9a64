"""Files that a killed process leaves whole, old or new; and a check that they belong to the run that finds them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in `path`'s folder, made if needed; it replaces `path` at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    yield temporary
    os.replace(temporary, path)


def save_atomically(state, path: str | Path) -> None:
    """`torch.save` beside `path`, then rename."""
    with _replacing(path) as temporary:
        torch.save(state, temporary)


def write_json(value, path: str | Path, allow_nan: bool = True) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN or infinity unless `allow_nan`."""
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=allow_nan) + "\n")


def refuse_other_settings(path: str | Path, settings: dict) -> None:
    """Store the JSON `settings` of a run in `path`, or raise ValueError if other settings are stored there.

    The error names the folder and what differs. A setting that is None equals one that is absent."""
    path = Path(path)
    if not path.exists():
        write_json(settings, path)
        return
    there, here = _flat(json.loads(path.read_text())), _flat(settings)
    other = {name: (there.get(name), here.get(name)) for name in there | here if there.get(name) != here.get(name)}
    if other:
        raise ValueError(
            f"{path.parent} was made with other settings (there, here): {other}; choose another output folder or "
            "remove it"
        )


def _flat(settings: dict, within: str = "") -> dict:
    """Nested settings under one name each: {"draft": {"layers": 1}} -> {"draft.layers": 1}."""
    flat: dict = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) else {f"{within}{name}": value}
    return flat
