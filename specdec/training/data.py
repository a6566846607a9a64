"""Training data: jsonl rows of chats, texts or tokens -> packed rows of tokens, with labels only on what the assistant
says.

A row is `{"messages": [{"role", "content"}, …]}`, learned where an assistant speaks; `{"text": …}`, learned everywhere;
ShareGPT's `{"conversations": [{"from", "value"}, …]}`; or `{"tokens": [ids], "learned_from": n}`, learned from token n
on, which is what self-distillation writes. Errors name the file's row, counted from 1."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specdec.training.labels import IGNORED

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
KINDS = ("messages", "text", "tokens", "conversations")
PADDING = -1  # the document number of padding; negative is what `Backbone` takes for it


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows of S tokens: `tokens`, `labels` (IGNORED where nothing is learned) and `documents` (the number of each
    packed text), int32 `[N, S]`.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: Sequence[int] | slice) -> "Rows":
        """Those rows, as int64."""
        return Rows(*(x[indices].long() for x in (self.tokens, self.labels, self.documents)))

    def batch(self, step: int, size: int, seed: int = 0) -> "Rows":
        """The `size` rows of training step `step`: every epoch is a shuffle of its own, and the same step gets the same
        rows again.
        """
        places = range(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng([seed, epoch]).permutation(len(self))
            for epoch in {place // len(self) for place in places}
        }
        return self.take([int(orders[place // len(self)][place % len(self)]) for place in places])


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a jsonl file, or of a json file that is one list, ShareGPT's turned into messages. ValueError names a
    row of no known kind.
    """
    path = Path(path)
    if path.suffix == ".json":
        rows = enumerate(json.loads(path.read_text(encoding="utf-8")), 1)
    else:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # splitlines would also break at separators that JSON allows in its strings
        rows = ((number, _parse(line, f"{path}:{number}")) for number, line in enumerate(lines, 1) if line.strip())
    return [_checked(row, f"{path}:{number}") for number, row in rows]


def _parse(line: str, where: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _checked(row: dict, where: str) -> dict:
    kinds = [kind for kind in KINDS if isinstance(row, dict) and kind in row]
    if len(kinds) != 1:
        raise ValueError(
            f"{where} must hold one of {', '.join(KINDS)}, got "
            f"{sorted(row) if isinstance(row, dict) else type(row).__name__}"
        )
    if kinds == ["conversations"]:
        row = {"messages": sharegpt_messages(row["conversations"], where)}
    for message in row.get("messages", ()):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: a message has a role and a content, got {message!r}")
    return {**row, "where": where}


def sharegpt_messages(turns: Sequence[dict], where: str = "the row") -> list[dict]:
    """ShareGPT's `{"from", "value"}` turns as messages; an assistant's turn before any user's is left out, as chat
    templates refuse it.

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


def encode(row: dict, tokenizer, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """`(tokens, labels)` of one row, at most `max_length` long: a long text comes in pieces, a long chat is cut.

    Raises ValueError naming the row when nothing of it is to be learned (no assistant speaks, or only behind
    `max_length`), or when the chat template does not take it."""
    where = row.get("where", "the row")
    if "messages" in row:
        tokens, labels = _encode_chat(row["messages"], tokenizer, where)
    elif "tokens" in row:
        tokens = list(row["tokens"])
        labels = [IGNORED] * row["learned_from"] + tokens[row["learned_from"] :]
    else:
        tokens = tokenizer(row["text"])["input_ids"]
        tokens = tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]
        labels = tokens
    pieces = range(0, len(tokens), max_length) if "text" in row else range(1)
    learned = False
    for start in pieces:
        part = labels[start : start + max_length]
        learned |= any(label != IGNORED for label in part[2:])  # the first head's first label is the third token
        yield tokens[start : start + max_length], part
    if not learned:
        raise ValueError(
            f"{where} has nothing to learn: no token of an assistant within its first {max_length} of "
            f"{len(tokens)} tokens"
        )


def _encode_chat(messages: list[dict], tokenizer, where: str) -> tuple[list[int], list[int]]:
    """By the template's own marks ({% generation %}) where it has them, else by what each assistant's turn adds to the
    rendered text.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has nothing to learn: no assistant speaks in it")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"{where} is a chat, but the tokenizer has no chat template: give rows of texts, or set "
            "tokenizer.chat_template"
        ) from error
    if re.search(r"{%-?\s*generation\b", template):
        out = apply_template(
            messages, tokenizer, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, said = list(out["input_ids"]), out["assistant_masks"]
    else:
        text, spans = _assistant_spans(messages, tokenizer, where)
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot tell where its tokens lie in a text; take a fast tokenizer"
            )
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = out["input_ids"]
        said = [
            any(start < end <= stop for start, stop in spans) for _, end in out["offset_mapping"]
        ]  # some tokenizers trim where a token begins
    return tokens, [token if learned else IGNORED for token, learned in zip(tokens, said, strict=True)]


def _assistant_spans(messages: list[dict], tokenizer, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the places `[start, stop)` of its characters that are the assistant's, the end of its turn
    included.
    """
    render = lambda part, **options: apply_template(part, tokenizer, where, tokenize=False, **options)
    text, spans = render(messages), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:number], add_generation_prompt=True), render(messages[: number + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"{where}: the chat template changes earlier turns when later ones come, so what message "
                    f"{number} adds cannot be told; "
                    "mark it with {% generation %} in the template"
                )
            spans.append((len(before), len(after)))
    return text, spans


def apply_template(messages: list[dict], tokenizer, where: str, **options):
    """What the tokenizer's `apply_chat_template` makes of some messages; its errors become a ValueError that names
    their row, `where`.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, ValueError) as error:  # such as text + list in it; nothing before the first turn
        raise ValueError(f"{where}: the chat template does not take it: {error}") from error


def build_rows(rows: Sequence[dict], tokenizer, max_length: int, packing: bool = True) -> Rows:
    """All rows as tokens. With `packing` several texts share a row of `max_length`, none split; without, each has a row
    of its own.
    """
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3, got {max_length}")
    packed: list[list[tuple[list[int], list[int]]]] = []
    room = 0
    for tokens, labels in (piece for row in rows for piece in encode(row, tokenizer, max_length)):
        if not packing or len(tokens) > room:
            packed.append([])
            room = max_length
        packed[-1].append((tokens, labels))
        room -= len(tokens)
    if not packed:
        raise ValueError("there are no rows to learn from")
    length = max(sum(len(tokens) for tokens, _ in row) for row in packed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens, labels, documents = (np.full((len(packed), length), fill, np.int32) for fill in (pad, IGNORED, PADDING))
    for number, row in enumerate(packed):
        start = 0
        for document, (ids, wanted) in enumerate(row):
            stop = start + len(ids)
            tokens[number, start:stop], labels[number, start:stop], documents[number, start:stop] = (
                ids,
                wanted,
                document,
            )
            start = stop
    return Rows(*(torch.from_numpy(x) for x in (tokens, labels, documents)))
