"""Times of rounds, kept in a file between processes: the same card, versions and models take the same time again."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
Known = dict[str, tuple[int, int, float]]  # as `RoundTimes.known`


def default_file() -> Path | None:
    """In the user's cache folder, if there is one; deleting it measures everything anew."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "specdec", "round_times.json")
    except RuntimeError:  # a user without a home
        return None


@dataclass(frozen=True, slots=True)
class KeptTimes:
    """The part of `file` that belongs to a `key`, which names everything that times depend on but the number of rows.

    Without a file nothing is kept. A file that cannot be read or written changes nothing but what is measured again."""

    file: Path | None = None
    key: str = ""

    def load(self, rows: int) -> Known:
        """What is kept for so many rows."""
        try:
            found = self._read().get(self._name, {}).get(str(rows), {})
            return {name: (int(levels), int(nodes), float(seconds)) for name, (levels, nodes, seconds) in found.items()}
        except (AttributeError, TypeError, ValueError):  # JSON of another structure
            return {}

    def save(self, rows: int, known: Known) -> None:
        """Keep `known` for so many rows, beside what other keys have."""
        if self.file is None:
            return
        entries = self._read()
        entries.setdefault(self._name, {"about": self.key})[str(rows)] = known
        own = self.file.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps({"format": FORMAT, "entries": entries}))
            own.replace(self.file)

    @property
    def _name(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()[:16]

    def _read(self) -> dict:
        try:
            found = json.loads(self.file.read_text()) if self.file is not None else {}
        except (OSError, ValueError):
            return {}
        entries = found.get("entries") if isinstance(found, dict) and found.get("format") == FORMAT else None
        return entries if isinstance(entries, dict) else {}
