"""A drafter from a folder or the hub, whatever kind it is of."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from specdec.drafters.base import Drafter
from specdec.drafters.kinds import drafter_kinds, kind_of
from specdec.model.runner import ModelRunner


@runtime_checkable
class Described(Protocol):
    """A drafter that comes from a file."""

    def describe(self) -> str:
        """What the file said, and what its format decided."""


def load_drafter(name: str | Path, target: Any, kind: str | None = None, **options: Any) -> Drafter:
    """The drafter in a folder or a hub repository, for `target`, a transformers model or a `ModelRunner`.

    Kinds of files: EAGLE-3 and 3.1 in the formats of speculators and of SGLang, SpecForge and the original, P-EAGLE,
    DFlash, DFlash2 and DSpark in the formats of speculators, z-lab and DeepSpec, Domino and JetSpec in those of
    SpecForge and NeMo, Gemma 4's assistants, Medusa heads in all their layouts, what installed packages add, and else a
    draft model.

    kind: one of `specdec --help`'s, such as "eagle3" or "mtp" (None: what config.json shows).
    options: of the kind, such as num_tokens; for EAGLE-3 also `read` and `ignore`, see `load_eagle3`.

    `drafter.describe()` of learned drafters tells what the file said and what its format decided. Raises
    FileNotFoundError or ValueError, naming what is missing, left over, unknown or made for another target."""
    kinds = drafter_kinds()
    chosen = kind_of(str(name), kinds) if kind is None else kind
    if chosen not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    runner = target if isinstance(target, ModelRunner) else ModelRunner(target, mode="eager")
    drafter = kinds[chosen].make(runner, str(name), **options)
    drafter.validate(runner)
    return drafter
