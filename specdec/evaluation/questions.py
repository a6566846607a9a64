"""Questions of tasks: prompts and conversations, from files of Spec-Bench, MT-Bench, SPEED-Bench, DeepSpec or own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.tiny_pair import load_tiny_pair

SHIPPED = "shipped"  # the task of the prompts that ship with the library
SUFFIXES = (".json", ".jsonl")
Turn = str | tuple[dict, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What a user says, one turn after the other; the answers come from a model.

    kind: its category.
    number: its id in the file, or its place among those of its kind.
    turns: each a text, or messages of a chat of which the last is the user's.
    """

    kind: str
    number: int | str
    turns: tuple[Turn, ...]

    def __post_init__(self):
        if not self.turns or not all(self.turns):
            raise ValueError(f"a question needs at least one turn, none of them empty, got {self.turns!r}")


def read_text(path: str | Path) -> str:
    """The text of a file, or of standard input for "-"."""
    if path == "-":
        import sys

        return sys.stdin.read()
    return Path(path).read_text(encoding="utf-8")


def read_questions(path: str) -> list[Question]:
    """The questions of a file.

    A .jsonl or .json file holds texts, or objects with "prompt" (a text or messages), "messages" (SPEED-Bench; a new
    turn begins where the user speaks twice; a last answer is left out) or "turns" (Spec-Bench, MT-Bench, DeepSpec),
    perhaps with "kind" or "category" and "question_id". Any other file holds a prompt a line. Raises ValueError, naming
    the line, for what is none."""
    text, name = read_text(path), str(path)
    if not name.endswith(SUFFIXES):
        rows: list[Any] = [line for line in text.split("\n") if line.strip()]
    else:
        try:
            rows = json.loads(text)
            rows = rows if isinstance(rows, list) else [rows]
        except ValueError:
            lines = enumerate(text.split("\n"), 1)
            rows = [_parsed(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    counts = dict[str, int]()
    return [_question(row, f"{path}, prompt {number}", counts) for number, row in enumerate(rows, 1)]


def shipped_questions(of_each_kind: int | None = None) -> list[Question]:
    """The held-out prompts that ship: code, prose, data and editing, or some of each kind."""
    prompts = load_tiny_pair().prompts
    return [
        Question(kind, number, (text,))
        for kind, texts in prompts.items()
        for number, text in enumerate(texts[:of_each_kind])
    ]


def some_of(questions: Sequence[Question], count: int | None) -> list[Question]:
    """At most `count` questions, evenly from all of them (None: all)."""
    if count is None or count >= len(questions):
        return list(questions)
    return [questions[i * len(questions) // count] for i in range(count)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _question(row: Any, where: str, counts: dict[str, int]) -> Question:
    """One row of a file; `counts` are those of each kind so far."""
    fields = row if isinstance(row, dict) else {"prompt": row}
    given = fields.get("prompt", fields.get("messages"))
    turns: tuple[Turn, ...] = ()
    if isinstance(given, str):
        turns = (given,)
    elif isinstance(given, list):
        turns = _turns_of(given)
    elif given is None and isinstance(fields.get("turns"), list):
        turns = tuple(
            (turn,) if isinstance(turn, dict) else ({"role": "user", "content": turn},) for turn in fields["turns"]
        )
    if not turns or not all(turns):
        keys = f"an object with {', '.join(list(row)[:5])}" if isinstance(row, dict) and row else "neither"
        raise ValueError(f"{where} must be a text, or an object with prompt, messages or turns, got {keys}")
    kind = str(fields.get("kind", fields.get("category", "own")))
    number = fields.get("question_id", counts.get(kind, 0))
    counts[kind] = counts.get(kind, 0) + 1
    return Question(kind, number if isinstance(number, int) else str(number), turns)


def _turns_of(messages: list) -> tuple[Turn, ...]:
    """Messages as turns: all up to a user's message that another one of the user follows."""
    if not all(isinstance(one, dict) and "role" in one for one in messages):
        return ()
    messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    turns, turn = list[Turn](), list[dict]()
    for message, after in zip(messages, [*messages[1:], None], strict=True):
        turn.append(message)
        if after is None or message["role"] == after["role"] == "user":
            turns.append(tuple(turn))
            turn = []
    return tuple(turns)
