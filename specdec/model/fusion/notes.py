"""Which operations of a model were fused and why others were not, for `generator.explain()`."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """One operation of a layer, which is fused, or not for the reason `why`.

    operation: "product", "norm", "rotation", "rotary table", "gate" or "sum".
    layer: the module's class.
    lost: a module of a supported kind that was not recognised.
    """

    operation: str
    layer: str
    why: str | None = None
    lost: bool = False


def warn_of_lost(notes: Iterable[Note]) -> None:
    """Warn of supported kinds of layers that were not recognised, once for each kind."""
    for note in dict.fromkeys(note for note in notes if note.lost):
        warnings.warn(
            f"{note.layer}: its {note.operation} is no longer recognised and runs unfused, which is slower: "
            f"{note.why}; generator.explain() says more",
            stacklevel=3,
        )


def table(notes: Iterable[Note]) -> str:
    """A text table with a line for each operation and kind of layer: how many, fused or not, and why not.

    >>> print(table([Note("norm", "RMSNorm"), Note("norm", "RMSNorm"), Note("gate", "MLP", "it clamps")]))
    operation  layer    count  fused
    norm       RMSNorm      2  yes
    gate       MLP          1  no: it clamps
    """
    counted = Counter(notes)
    rows = [("operation", "layer", "count", "fused")]
    rows += [
        (note.operation, note.layer, str(count), "yes" if note.why is None else f"no: {note.why}")
        for note, count in counted.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}" for row in rows)
