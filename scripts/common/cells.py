"""Cells of a table that a run may be cut between, and take over from an earlier run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from specdec.training.checkpoint import write_json


def measured(folder: Path | None, name: str, make: Callable[[], dict]) -> dict:
    """What a cell gives; kept in the folder, if there is one, and taken from there."""
    path = None if folder is None else folder / f"{name}.json"
    if path is not None and path.exists():
        return json.loads(path.read_text())
    began = time.perf_counter()
    found = {"records": [], **make(), "seconds": time.perf_counter() - began}
    if path is not None:
        write_json(found, path)
    return found
