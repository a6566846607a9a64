"""Files that a kill leaves whole: the old one or the new one, never half of one."""

import json
import os
from pathlib import Path

import torch


def save_atomically(state, path: str | Path) -> None:
    """`torch.save` beside `path`, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def write_json(value, path: str | Path) -> None:
    """Write `value` as indented JSON, atomically."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
