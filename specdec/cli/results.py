"""Result files: one JSON schema for every measurement, so that tables and figures print again without the machine.

A result is an object with
    schema       "specdec-lab result 1"; a reader refuses others
    kind         which measurement: "bench", "demo", …
    created      when it ended, UTC
    commit       of the checkout, with "+" where files differ from it; None outside one
    environment  versions, device and threads (`specdec.info.environment`)
    settings     the options of the run
    methods      one object per table line: name, kind of prompts, temperature, figures in tokens, seconds, ratios
    records      one object per decoded prompt: method, kind, prompt, temperature, repeat, new_tokens, seconds, …
and what else a kind of measurement adds.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specdec.info import commit, environment
from specdec.training.checkpoint import write_json

SCHEMA = "specdec-lab result 1"
FIELDS = ("schema", "kind", "created", "commit", "environment", "settings", "methods", "records")


def make_result(kind: str, settings: dict, methods: list[dict], records: list[dict], **more: Any) -> dict:
    """A result of this machine, now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"schema": SCHEMA, "kind": kind, "created": now, "commit": commit(), "environment": environment()}
    return about | {"settings": settings, "methods": methods, "records": records} | more


def write_result(result: dict, path: str | Path) -> None:
    """Write a result, atomically. Raises ValueError if fields of the schema are missing."""
    _require(result, "the result")
    write_json(result, Path(path))


def hand_over(result: dict, path: str | None) -> None:
    """Write a result to `path`; without one print it as a line, unless that would be a terminal."""
    if path is not None:
        write_result(result, path)
        print(f"figures: {path}")
    elif not sys.stdout.isatty():
        print(json.dumps(result))


def read_result(path: str | Path, kind: str | None = None) -> dict:
    """Read a result, of `specdec KIND` if that is given. Raises ValueError for a file that is none, naming the file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    _require(result, str(path))
    if kind not in (None, result["kind"]):
        raise ValueError(f"{path} must be a result of specdec {kind}, got one of kind {result['kind']!r}")
    return result


def _require(result: Any, where: str) -> None:
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{where} must be of schema {SCHEMA!r}, got {schema!r}")
    missing = [name for name in FIELDS if name not in result]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
