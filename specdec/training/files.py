"""Files of training rows: jsonl of chats, texts or tokens, and ShareGPT's json.

A row is `{"messages": [{"role", "content"}, …]}`, learned where an assistant speaks; `{"text": …}`, learned everywhere;
ShareGPT's `{"conversations": [{"from", "value"}, …]}`; or `{"tokens": [ids], "learned_from": n}`, learned from token n
on, which is what self-distillation writes. Errors name the file's row, counted from 1."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

USER, ASSISTANT = ("human", "user"), ("gpt", "chatgpt", "assistant", "bing", "bard")
ROLES = dict.fromkeys(USER, "user") | dict.fromkeys(ASSISTANT, "assistant") | {"system": "system"}
KINDS = ("messages", "text", "tokens", "conversations")


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a jsonl file or of a json file that is one list; ShareGPT's become messages.

    Raises ValueError naming a row that is no JSON or of no known kind."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    rows: Iterable[tuple[int, object]]
    if path.suffix == ".json":
        rows = enumerate(json.loads(text), 1)
    else:  # not splitlines, which also breaks at separators that JSON allows in its strings
        lines = enumerate(text.split("\n"), 1)
        rows = ((number, _parse(line, f"{path}:{number}")) for number, line in lines if line.strip())
    return [_checked(row, f"{path}:{number}") for number, row in rows]


def write_chats(source: str | Path, result: str | Path) -> tuple[int, int]:
    """Write the chats of `source` that have an answer to the jsonl `result`; returns (written, left out)."""
    rows = read_rows(source)
    chats = [row["messages"] for row in rows if any(m["role"] == "assistant" for m in row.get("messages", ()))]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in chats]
    Path(result).write_text("".join(lines), encoding="utf-8")
    return len(chats), len(rows) - len(chats)


def sharegpt_messages(turns: Sequence[dict], where: str = "the row") -> list[dict]:
    """ShareGPT's `{"from", "value"}` turns as messages, without answers that come before any user's turn.

    Chat templates refuse those. Raises ValueError naming `where` for a turn of an unknown kind.

    >>> sharegpt_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    messages: list[dict] = []
    for turn in turns:
        if turn.get("from") not in ROLES or "value" not in turn:
            raise ValueError(f"{where}: a ShareGPT turn has a value and a from among {', '.join(ROLES)}, got {turn!r}")
        role = ROLES[turn["from"]]
        if role != "assistant" or any(message["role"] == "user" for message in messages):
            messages.append({"role": role, "content": turn["value"]})
    return messages


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _checked(row: object, where: str) -> dict:
    """The row with `where` it stands, ShareGPT's turns as messages; ValueError for one of no known kind."""
    kinds = [kind for kind in KINDS if isinstance(row, dict) and kind in row]
    if not isinstance(row, dict) or len(kinds) != 1:
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} must hold one of {', '.join(KINDS)}, got {got}")
    if kinds == ["conversations"]:
        row = {"messages": sharegpt_messages(row["conversations"], where)}
    for message in row.get("messages", ()):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: a message has a role and a content, got {message!r}")
    return {**row, "where": where}
