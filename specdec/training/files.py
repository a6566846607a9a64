"""Files of training rows: a row a line, or one JSON list of rows, whatever the file's name ends with.

The kinds of rows are those of `specdec.training.kinds`. Errors name the file and the row: its line, or its place in the
list, counted from 1."""

import json
from collections.abc import Iterator
from pathlib import Path

from specdec.training.kinds import NO_ANSWER, answers, checked, spelled
from specdec.training.report import BadRow, RowReport, reported


def read_rows(path: str | Path, report: RowReport | None = None) -> list[dict]:
    """The rows of a file; chats become "messages", whatever they were, and every row says "where" it stands.

    Rows of no known kind are left out and counted in `report`; without one they are shown in a warning. Raises
    ValueError for a path that is no readable file of rows or has none, and with `report.strict` for the first bad
    row."""
    with reported(report) as own:
        rows = list(each_row(path, own))
        own.require(len(rows), str(path))
    return rows


def each_row(path: str | Path, report: RowReport) -> Iterator[dict]:
    """The rows of `read_rows` one by one, so that what is made of them finds the first bad row of the file first."""
    return report.good(_values(Path(path)), lambda found: checked(_parsed(*found), found[-1]))


def write_chats(source: str | Path, result: str | Path, report: RowReport | None = None) -> tuple[int, int]:
    """Write the chats of `source` that have an answer to the jsonl `result`; returns (written, left out).

    Raises ValueError where there are none; `report` is that of `read_rows`."""
    with reported(report) as own:
        before = own.left_out.total()
        chats = list(own.good(each_row(source, own), _answered))
        left_out = own.left_out.total() - before
        own.require(len(chats), str(source))
    lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats]
    Path(result).write_text("".join(lines), encoding="utf-8")
    return len(chats), left_out


def _answered(row: dict) -> dict:
    """The chat of a row, as other tools know it; BadRow where it is none, or nobody answers."""
    if not answers(row.get("messages", ())):
        raise BadRow(row["where"], NO_ANSWER)
    columns = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
    return {"messages": [spelled(message, calls=True) for message in row["messages"]], **columns}


def _values(path: Path) -> list[tuple[str | None, object, str]]:
    """`(line, value, place)` of every row: a line of text still to parse, or a value of a list without a line."""
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a file of rows" if path.is_dir() else f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:  # several values, a line each; or one that is broken
        if text.lstrip().startswith("[") and error.msg != "Extra data":
            raise ValueError(f"{path} begins a JSON list, but is none: {error}") from error
        # not splitlines, which also breaks at separators that JSON allows in its strings
        lines = enumerate(text.split("\n"), 1)
        return [(line, None, f"{path}:{number}") for number, line in lines if line.strip()]
    values = whole if isinstance(whole, list) else [whole]
    return [(None, value, f"{path}:{number}") for number, value in enumerate(values, 1)]


def _parsed(line: str | None, value: object, where: str) -> object:
    try:
        row = value if line is None else json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise BadRow(where, "not JSON", str(error)) from error
    except UnicodeEncodeError as error:  # in tokenizers it would be another error each
        raise BadRow(where, "half of a Unicode character", str(error)) from error
    return row
