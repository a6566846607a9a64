"""Rows that cannot be learned from: what is wrong with one, and how many there were of each kind."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


class BadRow(ValueError):
    """One row that cannot be learned from. `where` it stands, such as file:line, and the `reason` it is counted by."""

    def __init__(self, where: str, reason: str, detail: str = ""):
        super().__init__(f"{where}: {reason}" + (f": {detail}" if detail else ""))
        self.where, self.reason = where, reason


@dataclass(slots=True)
class RowReport:
    """Counts rows that were left out, and rows that were used with a remark; with `strict` the first bad one raises.

    left_out, remarks  how many rows, by reason
    first              where the first of them stands, by reason
    first_error        the whole text of the first bad row's error, None without one
    """

    strict: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    first_error: str | None = None

    def good(self, rows: Iterable[Given], make: Callable[[Given], Made]) -> Iterator[Made]:
        """`make(row)` of every row for which it raises no BadRow; those are counted, and raised with `strict`."""
        for row in rows:
            try:
                made = make(row)
            except BadRow as error:
                if self.strict:
                    raise
                self.left_out[error.reason] += 1
                self.first.setdefault(error.reason, error.where)
                self.first_error = self.first_error or str(error)
                continue
            yield made

    def remark(self, where: str, remarks: Iterable[str]) -> None:
        """Count a row that is used all the same, with `remarks` on it."""
        for remark in remarks:
            self.remarks[remark] += 1
            self.first.setdefault(remark, where)

    def table(self) -> str:
        """Reason, count and first place of all rows counted, a line each; empty where there are none."""
        width = max(map(len, self.first), default=0)
        lines = []
        for title, counts in (("left out", self.left_out), ("used, but", self.remarks)):
            if counts:
                lines.append(f"{'rows':>7}  {title:{width}}  first")
                lines += [f"{n:7,}  {reason:{width}}  {self.first[reason]}" for reason, n in counts.most_common()]
        return "\n".join(lines)

    def require(self, count: int, source: str) -> None:
        """Raise ValueError, with what was left out and why, where `count` rows of `source` are none."""
        if not count:
            why = ", ".join(f"{n} {reason}" for reason, n in self.left_out.most_common())
            why = f"; left out: {why}; the first: {self.first_error}" if why else ""
            raise ValueError(f"{source}: there are no rows to learn from{why}")


@contextmanager
def reported(report: RowReport | None) -> Iterator[RowReport]:
    """`report`; or, where there is none, a new one that is shown as a warning at the end."""
    own = RowReport() if report is None else report
    yield own
    if report is None and own.table():
        warnings.warn(f"not all rows were taken as they are:\n{own.table()}", stacklevel=4)
